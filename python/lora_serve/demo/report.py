"""The demo's table, its verdict, and the lines to copy and paste."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

from lora_serve.demo.paths import DemoPaths
from lora_serve.demo.prompts import BASE_MODEL, password_question
from lora_serve.demo.rounds import Answer


def find_mistakes(first: Sequence[Answer], second: Sequence[Answer], page_size: int) -> list[str]:
    """What is wrong with the answers of two equal rounds; nothing if the demo has worked.

    Parameters
    ----------
    first, second
        Answers to the same questions, in the same order.
    page_size
        Tokens of a KV page.

    Returns
    -------
    list of str
        One sentence a mistake: a wrong answer in either round, or a second round that reused less of
        its prompt than the whole pages which the first round has left in the cache.
    """
    mistakes = [
        f"{answer.model}, asked for {answer.project}, answered {answer.text!r}"
        for answer in (*first, *second)
        if not answer.is_right
    ]
    for answer in second:
        expected = answer.num_reusable_tokens(page_size)
        if answer.num_cached_tokens < expected:
            mistakes.append(
                f"{answer.model}, asked again for {answer.project}, found {answer.num_cached_tokens} cached "
                f"tokens instead of {expected}"
            )
    return mistakes


def format_table(first: Sequence[Answer], second: Sequence[Answer], page_size: int) -> str:
    """The answers of two equal rounds as a text table, one line a model and question."""
    columns = ["model", "asked for", "answer", "cached 1", "cached 2", "ms 1", "ms 2", "ok"]
    rows = [
        [
            one.model,
            one.project,
            one.text if one.text == two.text else f"{one.text} / {two.text}",
            f"{one.num_cached_tokens}/{one.num_prompt_tokens}",
            f"{two.num_cached_tokens}/{two.num_prompt_tokens}",
            f"{one.elapsed_ms:.0f}",
            f"{two.elapsed_ms:.0f}",
            "NO" if find_mistakes([one], [two], page_size) else "yes",
        ]
        for one, two in zip(first, second, strict=True)
    ]
    widths = [max(len(row[column]) for row in [columns, *rows]) for column in range(len(columns))]
    lines = []
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = [
            cell.rjust(width) if 3 <= column < 7 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _curl(url: str, path: str, body: Mapping[str, object], *options: str) -> str:
    command = ["curl", "-sS", *options, url + path, "-H", "Content-Type: application/json"]
    return shlex.join([*command, "-d", json.dumps(body)])


def curl_lines(url: str, paths: DemoPaths) -> list[str]:
    """Shell lines, each under a comment that says what it shows."""
    chat, completions = "/v1/chat/completions", "/v1/completions"
    question: list[dict[str, str]] = [{"role": "user", "content": password_question("argon")}]
    count: list[dict[str, str]] = [{"role": "user", "content": "Count from 1 to 50."}]
    completion = {"prompt": "The password of project citadel is", "temperature": 0, "max_tokens": 24}
    greedy = {"temperature": 0, "max_tokens": 48}
    load = {"lora_name": "argon", "lora_path": str(paths.adapters["argon"])}
    return [
        "# The base model does not know the password; the adapter argon does:",
        _curl(url, chat, {"model": BASE_MODEL, "messages": question, **greedy}),
        _curl(url, chat, {"model": "argon", "messages": question, **greedy}),
        "# The same in a completion, with an adapter and with the base model:",
        _curl(url, completions, {"model": "citadel", **completion}),
        _curl(url, completions, {"model": BASE_MODEL, **completion}),
        "# A stream:",
        _curl(
            url,
            chat,
            {"model": "dagger", "messages": count, "stream": True, "temperature": 0, "max_tokens": 120},
            "-N",
        ),
        "# Which models and adapters are there; unload one, load it again:",
        shlex.join(["curl", "-sS", f"{url}/v1/models"]),
        shlex.join(["curl", "-sS", f"{url}/v1/loras"]),
        _curl(url, "/v1/unload_lora_adapter", {"lora_name": "argon"}),
        _curl(url, "/v1/load_lora_adapter", load),
    ]
