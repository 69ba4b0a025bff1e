"""Tool calls found in given texts, whole and cut into pieces of any length."""

from __future__ import annotations

import json
import random

import pytest

from lora_serve.server.parsing.choice import choose_tool_parser
from lora_serve.server.parsing.forced_calls import CallListParser, NamedCallParser
from lora_serve.server.parsing.hermes import HermesParser
from lora_serve.server.parsing.llama3_json import Llama3JsonParser
from lora_serve.server.parsing.parts import Call, Content, MoreArguments


def call(name, **arguments):
    return (name, arguments)


def hermes(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def llama(name, **arguments):
    return json.dumps({"name": name, "parameters": arguments})


SUM = call("sum", a=1, b=[2, {"c": "}"}])
ECHO = call("echo", text='</tool_call> "quoted" ünï')
BROKEN = "<tool_call>\n{'name': 'sum'}\n</tool_call>"

HERMES = [
    ("", "", []),
    ("plain text\n", "plain text\n", []),
    (hermes("sum", **SUM[1]), "", [SUM]),
    (f"Let me see.\n\n{hermes('sum', **SUM[1])}\n", "Let me see.", [SUM]),
    (f"{hermes('sum', **SUM[1])}\n{hermes('now')}", "", [SUM, call("now")]),
    (f"a {hermes('now')} b {hermes('now')} c", "abc", [call("now")] * 2),
    (hermes("now").removesuffix("</tool_call>"), "", [call("now")]),
    (BROKEN, BROKEN, []),
    ("<tool_call>\n{", "<tool_call>\n{", []),
    ("if a <tool and b", "if a <tool and b", []),
    ("ends with <tool_", "ends with <tool_", []),
    ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [call("f", a=1)]),
]
LLAMA = [
    ("", "", []),
    ("  plain {text}", "  plain {text}", []),
    (llama("echo", **ECHO[1]), "", [ECHO]),
    (f"<|python_tag|>{llama('sum', **SUM[1])}", "", [SUM]),
    (f"{llama('sum', **SUM[1])}; {llama('now')}\n", "", [SUM, call("now")]),
    ('{"name": "f", "arguments": {"a": 1}}', "", [call("f", a=1)]),
    ('{"answer": 42}', '{"answer": 42}', []),
    ('{"name": "f", "parameters": {"a"', '{"name": "f", "parameters": {"a"', []),
    ("<|python_tag|>print(3)", "<|python_tag|>print(3)", []),
    ("<|python", "<|python", []),
    ("{not json}", "{not json}", []),
    (f"{llama('now')} and more", " and more", [call("now")]),
]


def parse(parser, text, lengths):
    """What the parser finds in a text that comes in pieces."""
    parts, start = [], 0
    for length in lengths:
        parts += parser.feed(text[start : start + length])
        start += length
    parts += parser.feed(text[start:]) + parser.flush()
    content, calls = "", []
    for part in parts:
        if isinstance(part, Content):
            content += part.text
        elif isinstance(part, Call):
            calls.append([part.name, part.arguments])
        else:
            assert isinstance(part, MoreArguments)
            calls[-1][1] += part.text
    return content, calls


def assert_parts(make_parser, text, content, calls):
    for seed in range(20):
        rng = random.Random(seed)
        lengths = [] if seed == 0 else [1] * len(text) if seed == 1 else rng.choices(range(5), k=len(text))
        found_content, found_calls = parse(make_parser(), text, lengths)
        assert found_content == content, (seed, text)
        assert [(name, json.loads(arguments)) for name, arguments in found_calls] == calls, (seed, text)


@pytest.mark.parametrize(("text", "content", "calls"), HERMES)
def test_hermes_calls_are_found_in_pieces_of_any_length(text, content, calls):
    assert_parts(HermesParser, text, content, calls)


@pytest.mark.parametrize(("text", "content", "calls"), LLAMA)
def test_llama_calls_are_found_in_pieces_of_any_length(text, content, calls):
    assert_parts(Llama3JsonParser, text, content, calls)


def test_forced_calls_are_found_in_pieces_of_any_length():
    calls = [SUM, ECHO, call("now")]
    text = json.dumps([{"name": name, "parameters": arguments} for name, arguments in calls])
    assert_parts(CallListParser, text, "", calls)
    assert_parts(lambda: NamedCallParser("sum"), json.dumps(SUM[1]), "", [SUM])


def test_a_forced_call_that_the_token_limit_cuts_off_is_content():
    assert_parts(CallListParser, '[{"name": "a", "parameters": {}}, {"na', ', {"na', [call("a")])


def test_content_before_a_call_does_not_wait_for_the_call():
    assert HermesParser().feed("Let me see. <tool_call>") == [Content("Let me see.")]
    assert HermesParser().feed("Let me see.") == [Content("Let me see.")]


def test_a_call_is_given_as_soon_as_it_is_complete():
    parser = HermesParser()
    assert parser.feed(hermes("now")) == [Call("now", "{}")]
    parser = Llama3JsonParser()
    assert parser.feed(llama("now")) == [Call("now", "{}")]


@pytest.mark.parametrize(
    ("option", "template", "parser"),
    [
        ("auto", "... <tool_call> ...", HermesParser),
        ("auto", "... <|python_tag|> ...", Llama3JsonParser),
        ("auto", "Environment: ipython", Llama3JsonParser),
        ("auto", "tools", None),
        ("auto", "", None),
        ("llama3_json", "... <tool_call> ...", Llama3JsonParser),
    ],
)
def test_parser_is_the_named_one_or_that_of_the_template(option, template, parser):
    assert choose_tool_parser(option, template) is parser
