"""CLIP's byte-pair text tokenizer, with the published ids.

The vocabulary is a file of the open_clip_torch package, read without importing that package (which takes seconds).
"""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex
import torch
from jaxtyping import Int
from torch import Tensor

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 48_894  # of those in the file, the ones that CLIP uses
SPECIAL = ("<start_of_text>", "<end_of_text>")
WORDS = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
CACHED_WORDS = 1 << 17  # ids of this many words are kept; captions repeat theirs


def get_tokenizer(
    model_name: str = "ViT-B-32",
    context_length: int | None = None,
    cache_dir: str | None = None,
    *,
    clean: str = "lower",
    **kwargs: Any,
) -> Tokenizer:
    """CLIP's tokenizer. As published the name is ignored: all the models share one vocabulary.

    Args:
        model_name, cache_dir: any; kept for callers of the published function.
        context_length: tokens of a row, 77 where not given or 0.
        clean: "lower" or "whitespace", which keeps the case.
        kwargs: the published function's others, such as bpe_path and additional_special_tokens, only as none of them.

    Raises:
        ValueError: a value that would make another tokenizer.
    """
    other = next((name for name, value in kwargs.items() if value), None)
    if other is not None:
        raise ValueError(f"{other}={kwargs[other]!r} would make another tokenizer than the models'; leave it out")
    return Tokenizer(context_length or 77, clean)


def _check(context_length: int) -> int:
    if context_length < 2:
        raise ValueError(f"context_length={context_length} does not hold the start and end tokens; at least 2")
    return context_length


class Tokenizer:
    """Texts -> rows of token ids: start, ids, end, zeros. Can be pickled and forked."""

    sot_token_id = MERGES + 512
    eot_token_id = MERGES + 513
    vocab_size = MERGES + 514

    def __init__(self, context_length: int = 77, clean: str = "lower") -> None:
        _check(context_length)
        if clean not in ("lower", "whitespace"):
            raise ValueError(f"clean={clean!r} is unknown; 'lower' or 'whitespace'")
        _vocabulary()  # a missing file is an error here, not in a worker
        self.context_length = context_length
        self.lower = clean == "lower"

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Int[Tensor, "n l"]:
        """Ids of each text, cut to the context length with the end token last. One string is a list of one."""
        length = self.context_length if context_length is None else _check(context_length)
        rows = np.zeros((1 if isinstance(texts, str) else len(texts), length), np.int64)
        for row, text in zip(rows, [texts] if isinstance(texts, str) else texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text)[: length - 2], self.eot_token_id]
            row[: len(ids)] = ids
        return torch.from_numpy(rows)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start, end and padding. An `<end_of_text>` in it becomes the end token, as in CLIP."""
        return [i for word in WORDS.findall(self._clean(text)) for i in _encode_word(word)]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of ids: every word is followed by a space."""
        _, _, symbols = _vocabulary()
        text = "".join(symbols[int(i)] for i in ids)
        return _bytes_of(text).decode("utf-8", errors="replace").replace("</w>", " ")

    def _clean(self, text: str) -> str:
        # Printable ASCII without entities is what the two repairs leave alone, and most captions are that.
        if not (text.isascii() and text.isprintable() and "&" not in text):
            import ftfy

            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = " ".join(text.split())
        return text.lower() if self.lower else text


def _byte_symbols() -> dict[int, str]:
    """CLIP's printable stand-in for each byte: itself where printable, else a character from 256 on; in their order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_SYMBOLS = _byte_symbols()
SYMBOL_BYTES = {symbol: byte for byte, symbol in BYTE_SYMBOLS.items()}


def _bytes_of(symbols: str) -> bytes:
    return bytes(SYMBOL_BYTES[symbol] for symbol in symbols)


@functools.cache
def _vocabulary() -> tuple[dict[str, int], dict[tuple[str, str], int], list[str]]:
    """(id of each symbol, rank of each merge, symbol of each id)."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("CLIP's vocabulary is a file of open_clip_torch; pip install open_clip_torch")
    lines = gzip.decompress((Path(spec.origin).parent / VOCABULARY).read_bytes()).decode().split("\n")
    merges = [(a, b) for a, b in (line.split() for line in lines[1 : MERGES + 1])]
    letters = list(BYTE_SYMBOLS.values())
    symbols = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), *SPECIAL]
    return {s: i for i, s in enumerate(symbols)}, {pair: rank for rank, pair in enumerate(merges)}, symbols


@functools.lru_cache(maxsize=CACHED_WORDS)
def _encode_word(word: str) -> tuple[int, ...]:
    """Byte-pair encoding of one word (Sennrich et al. 2016): merge the pair of lowest rank until none is known."""
    ids, ranks, _ = _vocabulary()
    if word in SPECIAL:
        return (ids[word],)
    letters = [BYTE_SYMBOLS[byte] for byte in word.encode("utf-8")]
    parts = [*letters[:-1], letters[-1] + "</w>"]
    while len(parts) > 1:
        best = min(zip(parts, parts[1:], strict=False), key=lambda pair: ranks.get(pair, MERGES))
        if best not in ranks:
            break
        parts = list(_merged(parts, best))
    return tuple(ids[part] for part in parts)


def _merged(parts: list[str], pair: tuple[str, str]) -> Iterator[str]:
    i = 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            yield parts[i] + parts[i + 1]
            i += 2
        else:
            yield parts[i]
            i += 1
