"""Parses the header of a safetensors file: which tensor, of which type and shape, lies at which bytes.

Source: the file format of Hugging Face safetensors. Different here: the header is parsed entry by entry, so
that a long one does not keep the interpreter lock, and what follows it is never read or mapped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_serve.lora.interpreter_lock import sharing_lock

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 64 << 20
# Bounds on one entry, because the JSON parser keeps the interpreter lock for the whole of it.
_MAX_TENSOR_ENTRY = 4096
_MAX_METADATA_ENTRY = 1 << 20
_METADATA_KEY = "__metadata__"
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8}

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class HeaderError(Exception):
    """The header is not that of a safetensors file; the text says why."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header of a safetensors file describes it.

    Parameters
    ----------
    dtype
        The format's own spelling: ``F32``, ``F16``, ``BF16``, ...
    shape
        As stored.
    start, num_bytes
        Its bytes in the file, counted from the file's start.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def parse_header(content: bytes) -> tuple[dict[str, TensorInfo], int]:
    """Parse a header and check that its tensors fill the rest of the file without holes.

    Parameters
    ----------
    content
        The file's first bytes: eight with the header's length, then the header itself.

    Returns
    -------
    dict[str, TensorInfo]
        By key, in the header's order.
    int
        The number of bytes that the whole file must have.

    Raises
    ------
    HeaderError
        It is not the JSON that the format asks for, a key is there twice, or tensors overlap or leave holes.
    """
    try:
        text = content[LENGTH_BYTES:].decode("utf-8")
        tensors: dict[str, TensorInfo] = {}
        for key, entry in sharing_lock(_entries(text)):
            if key != _METADATA_KEY:
                tensors[key] = _tensor_info(entry, len(content))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise HeaderError(f"{type(error).__name__}: {error}") from error
    return tensors, _check_bytes(tensors, len(content))


def _entries(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the pairs of a JSON object one after another."""
    at = _expect("{", text, 0)
    seen: set[str] = set()
    if text[at : at + 1] == "}":
        _check_end(text, at + 1)
        return
    while True:
        key, length = _DECODER.raw_decode(text[at : at + _MAX_TENSOR_ENTRY])
        if not isinstance(key, str) or key in seen:
            raise ValueError(f"{key!r:.80} at character {at}, expected a key that was not there before")
        seen.add(key)
        at = _expect(":", text, at + length)
        limit = _MAX_METADATA_ENTRY if key == _METADATA_KEY else _MAX_TENSOR_ENTRY
        value, length = _DECODER.raw_decode(text[at : at + limit])
        yield key, value
        at = _skip_space(text, at + length)
        if text[at : at + 1] == "}":
            _check_end(text, at + 1)
            return
        at = _expect(",", text, at)


def _expect(character: str, text: str, at: int) -> int:
    at = _skip_space(text, at)
    if text[at : at + 1] != character:
        raise ValueError(f"{text[at : at + 1]!r} at character {at}, expected {character!r}")
    return _skip_space(text, at + 1)


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def _check_end(text: str, at: int) -> None:
    if _skip_space(text, at) != len(text):
        raise ValueError(f"text after its end at character {at}")


def _tensor_info(entry: Any, data_start: int) -> TensorInfo:
    dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
    start, end = entry["data_offsets"]
    for number in (*shape, start, end):
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r:.80} in {entry!r:.200}, expected a whole number from 0")
    return TensorInfo(dtype, shape, data_start + start, end - start)


def _check_bytes(tensors: dict[str, TensorInfo], data_start: int) -> int:
    end = data_start
    for key, info in sharing_lock(sorted(tensors.items(), key=_start_of)):
        item_bytes = _ITEM_BYTES.get(info.dtype)
        expected = info.num_bytes if item_bytes is None else math.prod(info.shape) * item_bytes
        if info.start != end or info.num_bytes != expected or expected < 0:
            raise HeaderError(
                f"tensor '{key}' of shape {list(info.shape)} takes bytes {info.start - data_start} to "
                f"{info.start - data_start + info.num_bytes}, expected {expected} bytes from "
                f"{end - data_start} on"
            )
        end += info.num_bytes
    return end


def _start_of(item: tuple[str, TensorInfo]) -> tuple[int, int]:
    # An empty tensor starts where the next one does.
    return item[1].start, item[1].num_bytes
