"""What a chat request asks for besides sampling: tools, the form of the answer, its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.structured_outputs import StructuredOutputsParams
from lora_serve.server.parsing.forced_calls import (
    CallListParser,
    NamedCallParser,
    schema_of_arguments,
    schema_of_calls,
    tag_of_strict_calls,
)
from lora_serve.server.parsing.hermes import HermesParser
from lora_serve.server.parsing.parts import ToolParser
from lora_serve.server.protocol.chat import ChatCompletionRequest
from lora_serve.server.protocol.tools import FunctionDefinition, NamedToolChoice
from lora_serve.server.request_errors import RequestError
from lora_serve.server.structured_form import build_form, form_of

MakeToolParser = Callable[[], ToolParser]


@dataclass(frozen=True)
class ModelFormats:
    """How the served model writes the parts of its answers.

    Parameters
    ----------
    make_tool_parser : callable or None
        Makes what finds an answer's tool calls; None = nobody knows how the model writes them.
    chat_template : str
        The model's; empty = there is none.
    """

    make_tool_parser: MakeToolParser | None = None
    chat_template: str = ""


@dataclass(frozen=True)
class ChatPlan:
    """What becomes of one chat request.

    Parameters
    ----------
    form : StructuredOutputsParams or None
        Of the answer, after its reasoning; None = free.
    tools : list of dict, or None
        What the chat template shows.
    make_tool_parser : callable or None
        For each answer; None = it has no tool calls.
    max_calls : int or None
        Most calls of an answer; None = any number.
    """

    form: StructuredOutputsParams | None = None
    tools: list[dict[str, Any]] | None = None
    make_tool_parser: MakeToolParser | None = None
    max_calls: int | None = None


def plan_chat(request: ChatCompletionRequest, formats: ModelFormats) -> ChatPlan:
    """Decide what becomes of a chat request.

    Raises
    ------
    RequestError
        Its fields contradict each other, or ask for what this model's template or the server cannot do.
    """
    form = form_of(request)
    tools = request.tools or []
    choice = request.tool_choice
    if not tools:
        if choice is not None and choice not in ("none", "auto"):
            raise RequestError(
                "tool_choice asks for a call but tools is empty; send tools",
                param="tool_choice",
                code="invalid_value",
            )
        return ChatPlan(form=form)
    if choice == "none":
        return ChatPlan(form=form)
    functions = _functions(request)
    check_takes_tools(formats.chat_template)
    if form is not None:
        raise RequestError(
            "tools and a form of the answer (response_format, structured_outputs) exclude each other; send "
            'one of them, or "tool_choice": "none"',
            param="tools",
            code="unsupported_field",
        )
    is_parallel = request.parallel_tool_calls is not False
    shown = tools_for_template(functions)
    max_calls = None if is_parallel else 1
    if isinstance(choice, NamedToolChoice):
        function = _find(functions, choice.function.name)
        form = _form_of_call(schema_of_arguments(function))
        return ChatPlan(form, shown, lambda: NamedCallParser(function.name), 1)
    if choice == "required":
        form = _form_of_call(schema_of_calls(functions, is_parallel=is_parallel))
        return ChatPlan(form, shown, CallListParser, max_calls)
    if formats.make_tool_parser is None:
        raise RequestError(
            "tools: the model's chat template does not tell how its calls are written, so they could not be "
            "found in the answer; start the server with --tool-call-parser, or send a tool_choice that asks "
            "for a call",
            param="tools",
            code="unsupported_field",
        )
    if formats.make_tool_parser is HermesParser and any(function.strict for function in functions):
        form = _form_of_strict_calls(functions, is_parallel=is_parallel)
    return ChatPlan(form, shown, formats.make_tool_parser, max_calls)


def _form_of_call(schema: dict[str, Any]) -> StructuredOutputsParams:
    """Calls are for programs: nothing is laid out, which costs tokens."""
    return build_form("tools", {"json": schema, "disable_any_whitespace": True})


def _form_of_strict_calls(
    functions: list[FunctionDefinition], *, is_parallel: bool
) -> StructuredOutputsParams:
    try:
        tag = tag_of_strict_calls(functions, is_parallel=is_parallel)
    except InvalidArgumentError as error:
        raise RequestError(str(error), param="tools", code="invalid_value") from None
    return build_form("tools", {"structural_tag": tag})


def _functions(request: ChatCompletionRequest) -> list[FunctionDefinition]:
    functions = [tool.function for tool in request.tools or []]
    names = [function.name for function in functions]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise RequestError(
                f"tools has two functions with the name {name!r}; give each its own",
                param=f"tools.{index}.function.name",
                code="invalid_value",
            )
    return functions


def _find(functions: list[FunctionDefinition], name: str) -> FunctionDefinition:
    for function in functions:
        if function.name == name:
            return function
    raise RequestError(
        f"tool_choice names the function {name!r} but tools has "
        f"{', '.join(repr(function.name) for function in functions)}; name one of these",
        param="tool_choice.function.name",
        code="invalid_value",
    )


def check_takes_tools(chat_template: str) -> None:
    """Require a chat template that shows tools to the model.

    Raises
    ------
    RequestError
        It does not: the request's tools would be ignored.
    """
    if "tools" not in chat_template:
        raise RequestError(
            "tools: the model's chat template does not show tools to the model; remove the field, or serve a "
            "model whose template does",
            param="tools",
            code="unsupported_field",
        )


def tools_for_template(functions: Sequence[FunctionDefinition]) -> list[dict[str, Any]]:
    """Give functions as chat templates take them."""
    return [
        {"type": "function", "function": function.model_dump(exclude_none=True, exclude={"strict"})}
        for function in functions
    ]
