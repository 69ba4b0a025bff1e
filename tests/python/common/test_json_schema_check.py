"""A schema that passes is kept to: what it forbids, its grammar does not accept."""

from __future__ import annotations

import json

import pytest

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.json_schema_check import MAX_EXPRESSION_CHARACTERS, check_json_schema

END = 256
INT = {"type": "integer"}
STR = {"type": "string"}


def obj(**properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


def tagged(*kinds):
    return {"oneOf": [obj(kind={"const": kind}, **{kind: INT}) for kind in kinds]}


@pytest.fixture(scope="module")
def compiler():
    xgrammar = pytest.importorskip("xgrammar", reason="a dependency of the package")
    vocab = [bytes([i]) for i in range(256)] + [b""]
    info = xgrammar.TokenizerInfo(vocab, xgrammar.VocabType.RAW, stop_token_ids=[END])
    return xgrammar.GrammarCompiler(info, max_threads=1)


KEPT = [
    (obj(a=INT), '{"a": 1}', ['{"a": "x"}', "{}", '{"a": 1, "b": 2}', "[]", '{"a": 1.5}']),
    ({"type": ["integer", "null"]}, "null", ['"x"', "1.5"]),
    ({"type": "array", "items": INT, "minItems": 1, "maxItems": 2}, "[1]", ["[]", "[1, 2, 3]", '["x"]']),
    ({"type": "array", "prefixItems": [INT, STR], "items": False}, '[1, "x"]', ['["x"]', '[1, "x", 1]']),
    ({"type": "integer", "minimum": 3, "maximum": 5}, "4", ["2", "6"]),
    ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5}, "4", ["3", "5"]),
    ({"type": "integer", "multipleOf": 5}, "15", ["3"]),
    ({"type": "number", "minimum": 1.5, "maximum": 2}, "1.75", ["1.2", "2.5", "1e9"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, '"ab"', ['"a"', '"abcd"']),
    ({"type": "string", "pattern": "^a+$"}, '"aa"', ['"b"', '""']),
    ({"type": "string", "format": "date"}, '"2020-01-31"', ['"b"']),
    ({"enum": ["a", 1, None]}, "1", ['"b"', "2"]),
    ({"type": "string", "enum": ["a"]}, '"a"', ['"b"']),
    ({"const": {"a": [1]}}, '{"a":[1]}', ["{}"]),
    ({"anyOf": [INT, STR]}, "1", ["null"]),
    ({"oneOf": [INT, STR]}, '"x"', ["null"]),
    (tagged("a", "b"), '{"kind": "b", "b": 1}', ['{"kind": "a", "b": 1}']),
    ({"allOf": [INT]}, "1", ['"x"']),
    ({"type": "object", "additionalProperties": INT}, '{"b": 1}', ['{"b": "a"}']),
    ({"type": "object", "patternProperties": {"^a$": INT}}, '{"a": 1}', ['{"a": "x"}']),
    ({"type": "object", "additionalProperties": INT, "minProperties": 1}, '{"a": 1}', ["{}"]),
    (
        {"$ref": "#/$defs/node", "$defs": {"node": {**obj(next={"anyOf": [{"$ref": "#/$defs/node"}, INT]})}}},
        '{"next": {"next": 1}}',
        ['{"next": {}}'],
    ),
    ({"title": "T", "description": "d", **obj(a={"default": 1, **INT})}, '{"a": 1}', ["{}"]),
]
REFUSED = [
    (3, "must be an object"),
    ({"not": {}}, "# has not, which is not supported"),
    (obj(a={"type": "array", "uniqueItems": True}), "#/properties/a has uniqueItems"),
    ({"type": "array", "contains": INT}, "has contains"),
    ({"type": "number", "multipleOf": 5}, "multipleOf of a number"),
    ({"type": "string", "format": "colour"}, "format 'colour'"),
    ({"type": "string", "pattern": "a", "minLength": 3}, "beside another limit"),
    ({"type": "string", "format": "date", "pattern": "a"}, "beside another limit"),
    ({"minimum": 3}, "has minimum without its type"),
    ({"type": "string", "minimum": 3}, "has minimum without its type"),
    ({"type": "colour"}, "the type 'colour'"),
    ({"type": []}, "has the type []"),
    ({**obj(a=INT), "required": ["b"]}, "requires 'b'"),
    ({**obj(a=INT), "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"if": INT, "then": {"const": 2}}, "has if"),
    ({"allOf": [INT, {"type": "integer", "minimum": 3}]}, "allOf with several schemas"),
    ({"oneOf": [INT, {"type": "number"}]}, "could match together"),
    (tagged("a", "a"), "could match together"),
    ({"type": "integer", "enum": ["a", 1]}, "the value 'a', which is not of its type"),
    ({"type": "integer", "minimum": 3, "enum": [1]}, "side by side"),
    ({**obj(a=INT), "anyOf": [{"required": ["a"]}]}, "side by side"),
    ({"type": "integer", "anyOf": [{"const": 1}]}, "type beside anyOf"),
    ({"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": INT}}, "side by side"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"not": {}}}}, "#/$defs/a has not"),
    ({"type": "array", "items": {"not": {}}}, "#/items has not"),
]


def accepts(xgrammar, grammar, text):
    matcher = xgrammar.GrammarMatcher(grammar)
    return matcher.accept_string(text) and matcher.accept_token(END)


@pytest.mark.parametrize(("schema", "good", "bad"), KEPT)
def test_a_schema_that_passes_is_kept_to(compiler, schema, good, bad):
    import xgrammar

    check_json_schema(schema)
    grammar = compiler.compile_json_schema(json.dumps(schema))
    assert accepts(xgrammar, grammar, good)
    for text in bad:
        assert not accepts(xgrammar, grammar, text), text


@pytest.mark.parametrize(("schema", "text"), REFUSED)
def test_a_schema_that_would_not_be_kept_to_is_refused(schema, text):
    with pytest.raises(InvalidArgumentError) as caught:
        check_json_schema(schema)
    assert text in str(caught.value)


def test_a_schema_that_is_too_deep_is_refused():
    schema = INT
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InvalidArgumentError, match="deeper than"):
        check_json_schema(schema)


def test_patterns_share_the_room_of_one_expression():
    def schema(*lengths):
        strings = [{"type": "string", "pattern": "a" * length} for length in lengths]
        return {"type": "array", "prefixItems": strings, "items": False, "minItems": len(strings)}

    half = MAX_EXPRESSION_CHARACTERS // 2
    check_json_schema(schema(half, half))
    with pytest.raises(InvalidArgumentError, match=r"patterns exceed 2048 characters"):
        check_json_schema(schema(half, half + 1))
