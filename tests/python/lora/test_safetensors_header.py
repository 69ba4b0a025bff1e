from __future__ import annotations

import json
import struct

import pytest
import safetensors.torch
import torch

from lora_serve.lora.safetensors_header import HeaderError, TensorInfo, parse_header


def content(header):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data


def entry(start, end, shape=None, dtype="F32"):
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


def test_tensors_of_a_saved_file_are_described():
    tensors = {
        "b": torch.zeros(3, 5),
        "a": torch.zeros(7, dtype=torch.bfloat16),
        "scalar": torch.zeros((), dtype=torch.float16),
        "empty": torch.zeros(0, 4),
        "ünïcode": torch.zeros(1),
    }
    data = safetensors.torch.save(
        tensors, metadata={"format": "pt", "text": 'with "quotes", {braces} and \n'}
    )
    header_size = 8 + struct.unpack("<Q", data[:8])[0]
    found, size = parse_header(data[:header_size])
    assert size == len(data)
    assert found.keys() == tensors.keys()
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for key, tensor in tensors.items():
        info = found[key]
        assert (info.dtype, info.shape, info.num_bytes) == (
            names[tensor.dtype],
            tuple(tensor.shape),
            tensor.nbytes,
        )
    starts = [info.start for info in sorted(found.values(), key=lambda info: (info.start, info.num_bytes))]
    assert starts[0] == header_size


@pytest.mark.parametrize(
    "text", [b"{}", b" {  } \n", b'{"__metadata__":{}}', b'{"__metadata__" : {"a":"b"} }   ']
)
def test_header_without_tensors_has_none(text):
    assert parse_header(content(text)) == ({}, 8 + len(text))


def test_space_is_allowed_everywhere():
    text = (
        b' {\n "a" :\t{ "dtype" : "F32" , "shape":[ 2 ], "data_offsets":[0,8]} ,\r\n "b":'
        + json.dumps(entry(8, 12)).encode()
        + b" } "
    )
    found, size = parse_header(content(text))
    data_start = 8 + len(text)
    assert found == {
        "a": TensorInfo("F32", (2,), data_start, 8),
        "b": TensorInfo("F32", (1,), data_start + 8, 4),
    }
    assert size == data_start + 12


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"", "expected '{'"),
        (b"[]", "expected '{'"),
        (b"{", "Expecting value"),
        (b'{"a"', "expected ':'"),
        (b'{"a":', "Expecting value"),
        (b'{"a":{}', "KeyError"),
        (b"{1: {}}", "expected a key"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},}', "Expecting value"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}} x', "text after its end"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}', "expected ','"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "not there before"),
        ({"a": {**entry(0, 4), "shape": [1.0]}}, "expected a whole number"),
        ({"a": {**entry(0, 4), "shape": [True]}}, "expected a whole number"),
        ({"a": {**entry(0, 4), "shape": [-1]}}, "expected a whole number"),
        ({"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, "too many values"),
        ({"a": {**entry(0, 4), "data_offsets": [0, "4"]}}, "expected a whole number"),
        ({"a": {**entry(0, 4), "data_offsets": [4, 0]}}, "expected 4 bytes"),
        ({"a": entry(0, 8, shape=[3])}, "takes bytes 0 to 8, expected 12 bytes from 0"),
        ({"a": entry(4, 8)}, "takes bytes 4 to 8, expected 4 bytes from 0"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, "'b' of shape .* takes bytes 12 to 16"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, "'b' of shape .* takes bytes 4 to 12"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, "takes bytes 0 to 8, expected 8 bytes from 8"),
        ({"a": entry(0, 2**70, shape=[2**68 + 1])}, "takes bytes"),
        ({"a": {**entry(0, 4), "dtype": "F32" + "x" * 5000}}, "Unterminated string"),
        ({"x" * 5000: entry(0, 4)}, "Unterminated string"),
        ({"__metadata__": {"a": "x" * (2 << 20)}}, "Unterminated string"),
        (b'{"a":' + b"[" * 4000, "RecursionError|Expecting value"),
        (b'{"\xff": 1}', "UnicodeDecodeError"),
    ],
)
def test_broken_header_is_refused_with_the_reason(header, why):
    with pytest.raises(HeaderError, match=why):
        parse_header(content(header))


def test_key_that_is_there_twice_is_refused():
    one = json.dumps(entry(0, 4))
    with pytest.raises(HeaderError, match=r"'a' at character .* not there before"):
        parse_header(content(f'{{"a": {one}, "a": {one}}}'.encode()))


def test_every_prefix_of_a_header_is_refused():
    text = json.dumps({"__metadata__": {"format": "pt"}, "a": entry(0, 4), "b": entry(4, 8)}).encode()
    parse_header(content(text))
    for length in range(len(text)):
        with pytest.raises(HeaderError):
            parse_header(content(text[:length]))


def test_type_of_unknown_size_is_left_to_who_knows_the_types():
    found, size = parse_header(content({"a": entry(0, 3, shape=[4], dtype="F6")}))
    assert found["a"].dtype == "F6"
    assert found["a"].start + 3 == size
