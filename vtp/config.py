"""Typed configuration: frozen dataclasses, merged with a YAML file and `key=value` words by OmegaConf.

A configuration lives beside what it configures; this file only merges, prints, saves and compares.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, ListConfig, LiteralNode, OmegaConf, StringNode
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationKeyError, OmegaConfBaseException

T = TypeVar("T")

PLAIN = {  # OmegaConf's words for what a user has done, and ours
    r"Value '\$VALUE' of type '\$VALUE_TYPE'": "a value",
    r"Invalid value assigned: \w+ is not a TupleConfig.*": "a list belongs here, such as [0.5, 1.0]",
    r"TupleConfig length (\d+) does not match type hint length (\d+)": r"\2 values belong here, not \1",
    r"Incompatible value 'None' for field of type '(.+?)'$": r"a value of type \1 is missing",
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the mend."""


class OutOfRange(ConfigError):
    """A value outside its range; the message begins with the field, to which `merge` adds where it stands."""


def within(
    config: Any, names: str, low: int | float, high: int | float = math.inf, *, above: bool = False, below: bool = False
) -> None:
    """Check fields of a dataclass, in its __post_init__.

    Args:
        names: fields, parted by spaces; `a.b` is the field b of a. One that is None is let be.
        low, high: the range of each value, or of each of a tuple's.
        above, below: whether `low` and `high` themselves are refused.

    Raises:
        OutOfRange: a value that is not in the range; nan is in none.
    """
    for name in names.split():
        value = attrgetter(name)(config)
        for v in value if isinstance(value, tuple) else () if value is None else (value,):
            if not (low < v if above else low <= v) or not (v < high if below or high == math.inf else v <= high):
                floor = f"above {low:g}" if above else f"at least {low:g}"
                ceiling = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
                shown = list(value) if isinstance(value, tuple) else value
                raise OutOfRange(f"{name}={shown} must be {floor}{ceiling}")


def merge(default: T, overrides: Sequence[str] = (), file: Path | None = None) -> T:
    """Return `default` (a dataclass) with the values of a YAML file and then of `a.b=value` words put in.

    Raises:
        ConfigError: unknown key (the nearest one is named), a value of another type, or an unreadable file.
    """
    conf = OmegaConf.structured(default)
    _unfreeze(conf)
    if file is not None:
        read = _read(file)
        try:
            conf = _merge(conf, read)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
    for word in overrides:
        conf = _merge(conf, _parse(conf, word), said=f"{word}: ")
    try:
        return cast(T, _frozen(type(default), conf))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(_one_line(error)) from None


def load(file: Path, default: T) -> T:
    """Read a saved configuration over `default`, refusing keys that `default` does not have."""
    return merge(default, file=file)


def dump(config: Any) -> str:
    """The whole resolved tree as YAML, in the order of the fields."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(old: Any, new: Any, ignore: Sequence[str] = ()) -> list[str]:
    """Lines `key: old -> new` for every leaf in which two configurations of one type differ.

    Args:
        ignore: keys that are passed over, with all below them.
    """
    a, b = (
        _flat(OmegaConf.to_container(OmegaConf.structured(old))),
        _flat(OmegaConf.to_container(OmegaConf.structured(new))),
    )
    changed = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in changed if not _below(key, ignore)]


def _below(key: str, parts: Sequence[str]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def _read(file: Path) -> DictConfig:
    if not file.is_file():
        raise ConfigError(f"no configuration file at {file}")
    try:
        read = OmegaConf.load(file)
    except Exception as error:  # yaml's own error classes are not part of OmegaConf's interface
        raise ConfigError(f"{file} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(read, DictConfig):
        raise ConfigError(f"{file} must hold key: value pairs at its top level")
    return read


def _parse(conf: DictConfig, word: str) -> DictConfig:
    """`a.b=value` -> {a: {b: value}}, the value read as YAML; a field for words takes the word as it stands."""
    key, equals, value = word.partition("=")
    if not equals or not key.strip() or key.startswith("-"):
        raise ConfigError(f"'{word}' is not an override; write key=value, for example steps=100")
    node: Any = conf
    for name in key.split("."):
        node = node._get_node(name) if isinstance(node, DictConfig) and not node._is_none() and name in node else None
    of_words = isinstance(node, StringNode | LiteralNode)
    parsed = OmegaConf.create()
    try:
        parsed = OmegaConf.from_dotlist([word])
        if of_words and not isinstance(OmegaConf.select(parsed, key), str | None):
            OmegaConf.update(parsed, key, value)  # data=0001 is a folder, not the number 1
    except InterpolationKeyError:
        pass
    except Exception as error:  # yaml's own error classes are not part of OmegaConf's interface
        if not (of_words and value.startswith("*") and value.isprintable() and "$" not in value):
            raise ConfigError(f"{word}: the value is not valid YAML: {_one_line(error)}") from None
        OmegaConf.update(parsed, key, value)  # data=*.tar is no alias
    return parsed


def _merge(conf: DictConfig, layer: DictConfig, said: str = "") -> DictConfig:
    _check_groups(conf, layer, said)
    try:
        return cast(DictConfig, OmegaConf.merge(conf, layer))
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = str(error.full_key)  # of a.b=c it is a where there is no a
        key = next((leaf for leaf in _flat(OmegaConf.to_container(layer)) if _below(leaf, [key])), key)
        raise ConfigError(_unknown(key, conf)) from None
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(_one_line(error, said)) from None


def _check_groups(conf: DictConfig, layer: DictConfig, said: str, at: str = "") -> None:
    """Refuse a single value where a group of keys belongs; OmegaConf would name neither."""
    for key, given in cast("Iterable[tuple[str, Any]]", layer.items_ex(resolve=False)):
        group: Any = conf._get_node(key) if key in conf else None
        if not isinstance(group, DictConfig) or group._is_none():
            continue
        if not isinstance(given, DictConfig):
            below = ", ".join(f"{at}{key}.{name}" for name in cast("Iterable[str]", group))
            raise ConfigError(f"{said}{at}{key} is no value but a group of keys; give {below}")
        _check_groups(group, given, said, f"{at}{key}.")


def _unknown(key: str, conf: DictConfig) -> str:
    """The message for a key that is not there: names the key of the whole tree that reads most like it."""
    leaves = [leaf.split(".") for leaf in _flat(OmegaConf.to_container(conf))]
    keys = list(dict.fromkeys(known for leaf in leaves for known in accumulate(leaf, "{}.{}".format)))
    room, _, name = key.rpartition(".")

    def likeness(known: str) -> tuple[float, float]:
        beside, _, last = known.rpartition(".")
        alike = SequenceMatcher(None, name, last).ratio()
        return alike + 0.4 * (alike > 0.5 and beside == room), SequenceMatcher(None, key, known).ratio()

    nearest = max(keys, key=likeness)
    if likeness(nearest)[0] >= 0.6:
        return f"unknown key '{key}'; did you mean '{nearest}'?"
    while not (beside := [k for k in keys if k.rpartition(".")[0] == room]):
        room = room.rpartition(".")[0]
    return f"unknown key '{key}'; the keys are {', '.join(beside)}"


def _one_line(error: Exception, said: str = "") -> str:
    """OmegaConf's message without the lines about its own types, behind the word that was said or else the key."""
    lines = [line.strip() for line in str(error).splitlines()]
    own = ("object_type", "reference_type", "full_key")
    text = "; ".join(line for line in lines if line and not line.startswith(own))
    key = getattr(error, "full_key", None)
    for words, plain in PLAIN.items():
        text = re.sub(words, plain, text)
    return (said or (f"{key}: " if key else "")) + text


def _unfreeze(conf: Any) -> None:
    """OmegaConf makes frozen dataclasses read-only all the way down; merging has to write."""
    if isinstance(conf, DictConfig | ListConfig) and not conf._is_none():
        OmegaConf.set_readonly(conf, False)
        for node in conf.values() if isinstance(conf, DictConfig) else conf:
            _unfreeze(node)


def _frozen(cls: type, conf: Any, at: str = "") -> Any:
    """Build the dataclasses bottom up, so that each one's own checks see final values; lists become tuples."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        node = conf._get_node(field.name)
        if isinstance(node, DictConfig) and not node._is_none() and dataclasses.is_dataclass(OmegaConf.get_type(node)):
            values[field.name] = _frozen(cast(type, OmegaConf.get_type(node)), node, f"{at}{field.name}.")
        else:
            value = conf[field.name]
            value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            value = tuple(value) if isinstance(value, list) else value
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ConfigError(f"{at}{field.name}={number} is not a finite number")
            values[field.name] = value
    try:
        return cls(**values)
    except OutOfRange as error:
        raise OutOfRange(f"{at}{error}") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{at[:-1] or cls.__name__}: {error}") from None


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        return {k: v for key, node in tree.items() for k, v in _flat(node, f"{prefix}{key}.").items()}
    return {prefix[:-1]: tree}
