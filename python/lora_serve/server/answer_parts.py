"""Splits one chat answer into reasoning, content and tool calls, as its text comes."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from lora_serve.server.parsing.parts import Call, Content, MoreArguments, Part, ToolParser
from lora_serve.server.parsing.reasoning import ReasoningSplitter
from lora_serve.server.protocol.tools import FunctionCall, ToolCall, ToolCallDelta


@dataclass
class AnswerPiece:
    """What a piece of text has brought.

    Parameters
    ----------
    reasoning, content : str
        Each may be empty.
    calls : list of ToolCallDelta
        At most one entry a call.
    """

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)


class AnswerParts:
    """The parts of one answer.

    Parameters
    ----------
    splitter : ReasoningSplitter or None
        None = the answer has no reasoning.
    tool_parser : ToolParser or None
        None = the answer has no calls.
    max_calls : int or None
        Calls beyond are dropped: the request has asked for no more. None = there is no limit.

    Attributes
    ----------
    num_calls : int
        Calls so far.
    """

    def __init__(
        self, splitter: ReasoningSplitter | None, tool_parser: ToolParser | None, max_calls: int | None
    ) -> None:
        self._splitter = splitter
        self._tool_parser = tool_parser
        self._max_calls = max_calls
        self._drops_arguments = False
        self.num_calls = 0

    def take(self, text: str, *, is_last: bool) -> AnswerPiece:
        """Take the next piece of the text; with `is_last` give all that was held back."""
        piece = AnswerPiece()
        contents = [text]
        if self._splitter is not None:
            splits = [self._splitter.feed(text)] + ([self._splitter.flush()] if is_last else [])
            piece.reasoning = "".join(split.reasoning for split in splits)
            contents = [split.content for split in splits]
        parser = self._tool_parser
        if parser is None:
            piece.content = "".join(contents)
            return piece
        for content in contents:
            self._add(piece, parser.feed(content))
        if is_last:
            self._add(piece, parser.flush())
        return piece

    def _add(self, piece: AnswerPiece, parts: list[Part]) -> None:
        for part in parts:
            if isinstance(part, Content):
                piece.content += part.text
            elif isinstance(part, Call):
                self._add_call(piece, part)
            elif not self._drops_arguments:
                self._add_arguments(piece, part)

    def _add_call(self, piece: AnswerPiece, call: Call) -> None:
        self._drops_arguments = self.num_calls == self._max_calls
        if self._drops_arguments:
            return
        piece.calls.append(
            ToolCallDelta(
                index=self.num_calls,
                id=f"call_{uuid.uuid4().hex[:24]}",
                type="function",
                function=FunctionCall(name=call.name, arguments=call.arguments),
            )
        )
        self.num_calls += 1

    def _add_arguments(self, piece: AnswerPiece, more: MoreArguments) -> None:
        index = self.num_calls - 1
        if piece.calls and piece.calls[-1].index == index:
            function = piece.calls[-1].function
            function.arguments = (function.arguments or "") + more.text
            return
        piece.calls.append(ToolCallDelta(index=index, function=FunctionCall(arguments=more.text)))


def whole_calls(piece: AnswerPiece) -> list[ToolCall]:
    """Give the calls of an answer whose text was taken in one piece."""
    return [
        ToolCall(id=call.id, type="function", function=call.function)
        for call in piece.calls
        if call.id is not None
    ]
