"""Refuses JSON schemas of which a part would not be kept to.

The compiler of grammars leaves out, silently or with a line in a log, what it cannot express: then an answer
could break the schema that it was asked to keep to. What passes here is expressed exactly, or more strictly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from lora_serve.common.errors import InvalidArgumentError

_ANNOTATIONS = frozenset(
    {
        *("$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default"),
        *("examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
    }
)
_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_OF_TYPE: Mapping[str, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": _BOUNDS | {"multipleOf"},
    "number": _BOUNDS,
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"}),
    "object": frozenset(
        {
            *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
            *("minProperties", "maxProperties", "unevaluatedProperties"),
        }
    ),
    "boolean": frozenset(),
    "null": frozenset(),
}
_IMPLIES_TYPE = {"properties": "object", "prefixItems": "array", "items": "array"}
_FORMATS = frozenset(
    {
        *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri"),
        *("uri-reference", "uri-template", "json-pointer", "relative-json-pointer"),
    }
)
MAX_EXPRESSION_CHARACTERS = 2048
"""Most text of expressions and grammars: the time to compile them grows with its third power."""
_MAX_DEPTH = 64


def check_json_schema(schema: Any) -> None:
    """Refuse a schema that answers could break.

    Parameters
    ----------
    schema : Any
        A JSON value.

    Raises
    ------
    InvalidArgumentError
        Names the place in the schema, the keyword and what to do.
    """
    if not isinstance(schema, dict):
        raise InvalidArgumentError(f"the JSON schema is {schema!r} but must be an object")
    _Check(schema).check(schema, "#", 0)


class _Check:
    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._num_pattern_characters = 0

    def check(self, schema: Any, place: str, depth: int) -> None:
        """Check a schema and all that is in it."""
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            _refuse(place, f"is {schema!r}", "give an object, true or false")
        if depth > _MAX_DEPTH:
            _refuse(place, f"lies deeper than {_MAX_DEPTH} levels", "make it flatter")
        keywords = set(schema) - _ANNOTATIONS
        alone = keywords & {"$ref", "anyOf", "oneOf", "allOf"}
        if len(alone) > 1 or (alone and keywords - alone - {"type"}):
            _refuse(
                place,
                f"has {_names(keywords)} side by side",
                "nothing but annotations can stand beside $ref, anyOf, oneOf and allOf; merge them into one",
            )
        if not alone:
            self._check_values(schema, keywords, place)
        elif "type" in schema:
            _refuse(place, f"has type beside {_names(alone)}", "move type into it")
        if "oneOf" in schema and not self._are_disjoint(schema["oneOf"]):
            _refuse(
                place,
                "has oneOf with alternatives that one value could match together",
                "use anyOf, or give each its own type, or a required property with its own const",
            )
        if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) != 1:
            _refuse(place, "has allOf with several schemas", "merge them into one")
        for name, child in _children(schema):
            self.check(child, f"{place}/{name}", depth + 1)

    def _check_values(self, schema: dict[str, Any], keywords: set[str], place: str) -> None:
        if keywords & {"enum", "const"}:
            self._check_enum(schema, keywords, place)
            return
        types = _types(schema, place)
        if not types:
            types = {type_ for keyword, type_ in _IMPLIES_TYPE.items() if keyword in schema}
        if "multipleOf" in schema and "number" in types:
            _refuse(place, "has multipleOf of a number", "use it with type integer only")
        known = {"type"}.union(*(_OF_TYPE[type_] for type_ in types))
        for keyword in sorted(keywords - known):
            if any(keyword in of_type for of_type in _OF_TYPE.values()):
                _refuse(place, f"has {keyword} without its type", f"add the type that {keyword} is for")
            _refuse(place, f"has {keyword}, which is not supported", "remove it")
        if {"pattern", "format"} <= keywords or (
            keywords & {"pattern", "format"} and keywords & {"minLength", "maxLength"}
        ):
            _refuse(
                place,
                "has pattern or format beside another limit of the string",
                "express all of it in pattern",
            )
        self._num_pattern_characters += len(str(schema.get("pattern", "")))
        if self._num_pattern_characters > MAX_EXPRESSION_CHARACTERS:
            _refuse(
                place,
                f"is where the schema's patterns exceed {MAX_EXPRESSION_CHARACTERS} characters",
                "shorten them",
            )
        if "format" in schema and schema["format"] not in _FORMATS:
            _refuse(place, f"has the format {schema['format']!r}", "use pattern instead")
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            _refuse(place, "has properties or required of a wrong kind", "give an object and a list")
        for name in required:
            if name not in properties:
                _refuse(place, f"requires {name!r}, which is not among its properties", "add it there")

    @staticmethod
    def _check_enum(schema: dict[str, Any], keywords: set[str], place: str) -> None:
        if keywords - {"enum", "const", "type"} or {"enum", "const"} <= keywords:
            _refuse(place, f"has {_names(keywords)} side by side", "keep enum or const alone")
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if not isinstance(values, list) or not values:
            _refuse(place, f"has the enum {values!r}", "give a list of at least one value")
        types = _types(schema, place)
        for value in values:
            if types and not any(_is_of_type(value, type_) for type_ in types):
                _refuse(place, f"has the value {value!r}, which is not of its type", "remove it")

    def _are_disjoint(self, schemas: Any) -> bool:
        """True when no value can match two of the schemas, as far as their types and constants tell."""
        if not isinstance(schemas, list):
            return True  # The compiler refuses it.
        resolved = [self._resolve(schema) for schema in schemas]
        types = [_widest_types(schema) for schema in resolved]
        if all(types) and sum(map(len, types)) == len(set().union(*types)):
            return True
        if not all(isinstance(schema.get("properties"), dict) for schema in resolved):
            return False
        names = set.intersection(*(set(schema.get("required", [])) for schema in resolved))
        for name in names:
            constants = [_constants(schema["properties"].get(name)) for schema in resolved]
            if all(constants) and sum(map(len, constants)) == len(set().union(*constants)):
                return True
        return False

    def _resolve(self, schema: Any) -> dict[str, Any]:
        """Follow references within the schema; what cannot be followed is an empty schema."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
                break
            target: Any = self._root
            for part in schema["$ref"].removeprefix("#").split("/")[1:]:
                target = target.get(part) if isinstance(target, dict) else None
            schema = target
        return schema if isinstance(schema, dict) else {}


def _children(schema: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    for keyword in ("items", "additionalProperties", "propertyNames"):
        if keyword in schema:
            yield keyword, schema[keyword]
    for keyword in ("properties", "patternProperties", "$defs", "definitions"):
        children = schema.get(keyword)
        if isinstance(children, dict):
            yield from ((f"{keyword}/{name}", child) for name, child in children.items())
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        children = schema.get(keyword)
        if isinstance(children, list):
            yield from ((f"{keyword}/{index}", child) for index, child in enumerate(children))


def _types(schema: dict[str, Any], place: str) -> set[str]:
    if "type" not in schema:
        return set()
    found = schema["type"]
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not names:
        _refuse(place, f"has the type {found!r}", "give a name or a list of names")
    for name in names:
        if not isinstance(name, str) or name not in _OF_TYPE:
            _refuse(place, f"has the type {name!r}", f"use one of {', '.join(_OF_TYPE)}")
    return set(names)


def _widest_types(schema: dict[str, Any]) -> set[str]:
    found = schema.get("type")
    names = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return {"number" if name == "integer" else str(name) for name in names}


def _constants(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return {repr(value) for value in values} if isinstance(values, list) else set()


def _is_of_type(value: Any, type_: str) -> bool:
    if isinstance(value, bool):
        return type_ == "boolean"
    kinds: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "array": (list,),
        "object": (dict,),
        "null": (type(None),),
        "boolean": (),
    }
    return isinstance(value, kinds[type_])


def _names(keywords: Iterable[str]) -> str:
    return " and ".join(sorted(keywords))


def _refuse(place: str, found: str, what_to_do: str) -> NoReturn:
    raise InvalidArgumentError(f"the JSON schema cannot be kept to exactly: {place} {found}; {what_to_do}")
