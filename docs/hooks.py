"""Writes the configuration reference while the site is built, from the dataclasses and the comments on their fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from typing import Any, Literal, get_args, get_origin, get_type_hints

MARK = re.compile(r"<!-- fields of ([\w.]+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `<!-- fields of vtp.room.file.Class -->` by tables of that dataclass and those inside it."""
    return MARK.sub(lambda found: "\n".join(_tables(found.group(1))), markdown)


def _tables(name: str) -> list[str]:
    module, _, cls = name.rpartition(".")
    return _table(getattr(import_module(module), cls)(), "", page=cls)


def _table(config: Any, prefix: str, page: str) -> list[str]:
    cls, hints = type(config), get_type_hints(type(config))
    comments = _comments(cls)
    title = f"### `{prefix[:-1]}` {{: #{_anchor(page, prefix[:-1])} }}\n\n" if prefix else ""
    rows = [
        f"{title}{inspect.cleandoc(cls.__doc__ or '')}\n",
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    inside = []
    for field in dataclasses.fields(cls):
        value = getattr(config, field.name)
        key, kind, meaning = f"{prefix}{field.name}", _kind(hints[field.name]), comments.get(field.name, "")
        if dataclasses.is_dataclass(value):
            inside.append((value, f"{key}."))
            value, kind = f"[see below](#{_anchor(page, key)})", type(value).__name__
        else:
            value = f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"
        rows.append(f"| `{key}` | {_cell(kind)} | {value} | {_cell(meaning)} |")
    return [*rows, "", *(line for part in inside for line in _table(*part, page))]


def _anchor(page: str, key: str) -> str:
    return f"{page}-{key}".lower().replace(".", "-")


def _comments(cls: type) -> dict[str, str]:
    """The trailing comment of each field."""
    fields = re.finditer(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.MULTILINE)
    return {found.group(1): found.group(2) for found in fields}


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(hint))
    return hint.__name__ if type(hint) is type else str(hint)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
