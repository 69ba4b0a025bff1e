"""The documents against the code: options, commands, endpoints and links that they name exist."""

from __future__ import annotations

import argparse
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from lora_serve.cli.main import make_parser
from server.http_calls import make_app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]),
]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
OTHER_PROGRAMS = {
    "docs/serving.md": {"--backend", "--tokenizer"},  # guidellm
    "docs/scheduling.md": {"--plan-lead-us"},  # the simulator
    # scripts/tune_*.py
    "docs/tuning.md": {"--out", "--ranks", "--shapes", "--tokens", "--lora-rank", "--adapters"},
    # Google Benchmark, the simulator, bench_lora.py
    "benchmarks/README.md": {"--benchmark", "--dry-run", "--requests"}
    | {"--shapes", "--adapters", "--lora-ranks", "--rows-in-cache"},
    "CONTRIBUTING.md": {"--preset", "--build"},  # cmake
}
MIGRATING = "docs/migrating.md"
"""In its tables the first column has the options of other servers."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@functools.cache
def options_by_command() -> dict[str, set[str]]:
    """The long options of each command of lora-serve, such as 'lora-serve bench serve'."""
    return {
        parser.prog: {o for action in parser._actions for o in action.option_strings if o.startswith("--")}
        for parser in parsers_of(make_parser())
    }


def parsers_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers_of(command)


def own_text(page: Path) -> str:
    """The page without what it quotes of other servers."""
    text = page.read_text()
    if name_of(page) != MIGRATING:
        return text
    lines = [line for line in text.splitlines() if not line.startswith("    vllm serve ")]
    return "\n".join(re.sub(r"^\|[^|]*\|", "|", line) for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_in_a_document_is_one_of_lora_serve(page: Path) -> None:
    examples = re.findall(r'"(--[a-z-]+)"', "".join(path.read_text() for path in ROOT.glob("examples/*.py")))
    known = set().union(*options_by_command().values(), examples, OTHER_PROGRAMS.get(name_of(page), ()))
    assert set(OPTION.findall(own_text(page))) - known == set()


def test_every_option_of_the_server_is_in_the_table_of_the_serving_page() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    table = text.split("## Options\n", 1)[1].split("\n## ", 1)[0]
    assert set(OPTION.findall(table)) | {"--help"} == options_by_command()["lora-serve serve"]


def test_endpoints_of_the_serving_page_are_those_of_the_server() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    table = text.split("## Endpoints\n", 1)[1].split("\n## ", 1)[0]
    listed = set(re.findall(r"`(GET|POST|DELETE) (/[^`]*)`", table))
    app = make_app(tokenizer_info=True)
    served = {(method, path) for path, methods in routes_of(app.routes) for method in methods}
    served.add(("GET", "/openapi.json"))
    twins = {("POST", "/load_lora_adapter"), ("POST", "/unload_lora_adapter")}  # "also without /v1"
    assert listed | twins == served


def routes_of(routes) -> Iterator[tuple[str, set[str]]]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route.path.replace(":path}", "}").replace("{lora_name}", "{name}"), route.methods
        router = getattr(route, "original_router", None)
        if router is not None:
            yield from routes_of(router.routes)


def commands_of(page: Path) -> Iterator[str]:
    """The lines of code blocks that run lora-serve, continued ones joined."""
    code = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    code += re.findall(r"(?:^    .*\n)+", page.read_text(), re.MULTILINE)
    for block in code:
        for line in block.replace("\\\n", " ").splitlines():
            command = line.strip().removeprefix("$ ").strip()
            if command.startswith("lora-serve "):
                yield command


COMMANDS = [(name_of(page), command) for page in PAGES for command in commands_of(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {text}" for page, text in COMMANDS])
def test_every_command_in_a_document_can_be_parsed(page: str, command: str) -> None:
    assert page
    words = shlex.split(command, comments=True)
    make_parser().parse_args(words[1:])  # Ends the test with SystemExit where it cannot.


def anchors_of(page: Path) -> set[str]:
    """What a heading is called in a link: lower case, without punctuation, spaces as hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_in_a_document_leads_somewhere(page: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            lost.append(link)
    assert lost == []
