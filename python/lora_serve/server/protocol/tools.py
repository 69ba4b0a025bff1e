"""Tools that a model may call, and its calls."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from lora_serve.server.protocol.base import WRONG_KIND, RequestModel, ResponseModel


class FunctionDefinition(RequestModel):
    """A function that the model may call.

    Parameters
    ----------
    name : str
        Not empty.
    description : str or None
        For the model.
    parameters : dict or None
        A JSON schema of the arguments; null = there are none.
    strict : bool or None
        The arguments keep to the schema, as they do in any case where a call is forced. Not where the model
        decides whether to call and writes calls as Llama 3 does.
    """

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestModel):
    """A tool; there are only functions."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(RequestModel):
    """The function that is to be called."""

    name: str


class NamedToolChoice(RequestModel):
    """The call of one function."""

    type: Literal["function"]
    function: NamedFunction


def _kind_of_choice(value: object) -> str | None:
    if isinstance(value, dict):
        return "#object"
    return "#string" if value in ("none", "auto", "required") else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("#string")]
    | Annotated[NamedToolChoice, Tag("#object")],
    Discriminator(
        _kind_of_choice,
        custom_error_type=WRONG_KIND,
        custom_error_message="must be 'none', 'auto', 'required' or a function's name in an object",
    ),
]


class CalledFunction(RequestModel):
    """A call in a message of the conversation.

    Parameters
    ----------
    name : str
        The function.
    arguments : str
        A JSON object as text.
    """

    name: str
    arguments: str


class PastToolCall(RequestModel):
    """A call that the assistant has made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class FunctionCall(ResponseModel):
    """The called function; in a stream the name comes once, and the arguments in pieces."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(ResponseModel):
    """A call of the answer."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ToolCallDelta(ResponseModel):
    """The next piece of a call in a stream."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall
