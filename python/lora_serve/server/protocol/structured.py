"""Fields that ask for an answer of a given form."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from lora_serve.server.protocol.base import (
    UNSUPPORTED_FIELD,
    WRONG_KIND,
    RequestModel,
    refuse_unless,
)

_USE_ONE = "it is not supported; use json, json_object, regex, choice or grammar"


class JsonSchemaFormat(RequestModel):
    """A schema with its name.

    Parameters
    ----------
    name : str
        Not looked at.
    description : str or None
        Not shown to the model: the messages should say what the answer is for.
    schema_ : dict
        The field `schema`: a JSON schema.
    strict : bool or None
        The schema is kept to either way.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


def _refuse_other_types(value: object) -> object:
    """Name an unsupported type before its other fields are called unknown."""
    if isinstance(value, dict) and value.get("type") == "structural_tag":
        raise PydanticCustomError(
            UNSUPPORTED_FIELD,
            "type 'structural_tag' is not supported; use json_schema, or structured_outputs",
        )
    return value


class ResponseFormat(RequestModel):
    """The form of the answer, as OpenAI writes it.

    Parameters
    ----------
    type : {'text', 'json_object', 'json_schema'}
        'text' = any form.
    json_schema : JsonSchemaFormat or None
        With type 'json_schema'.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


ResponseFormatField = Annotated[ResponseFormat, BeforeValidator(_refuse_other_types)]


def _kind_of_json(value: object) -> str | None:
    if isinstance(value, str):
        return "#string"
    return "#object" if isinstance(value, dict) else None


JsonSchema = Annotated[
    Annotated[str, Tag("#string")] | Annotated[dict[str, Any], Tag("#object")],
    Discriminator(
        _kind_of_json, custom_error_type=WRONG_KIND, custom_error_message="must be a JSON schema or its text"
    ),
]


class StructuredOutputs(RequestModel):
    """The form of the answer, as vLLM writes it: exactly one of the first five fields.

    Parameters
    ----------
    json_ : dict or str or None
        The field `json`: a JSON schema.
    json_object : bool or None
        True = any JSON object.
    regex : str or None
        A regular expression that the whole answer matches.
    choice : list of str or None
        The answer is one of these.
    grammar : str or None
        A grammar in GBNF, whose first rule is 'root'.
    disable_any_whitespace : bool or None
        JSON is written in one line, with one space after colons and commas.
    """

    json_: JsonSchema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool | None = None

    disable_additional_properties: bool | None = None
    whitespace_pattern: Annotated[Any, AfterValidator(refuse_unless(because=_USE_ONE))] = None
    structural_tag: Annotated[Any, AfterValidator(refuse_unless(because=_USE_ONE))] = None
