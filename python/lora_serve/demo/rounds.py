"""One round of the demo: every model is asked every question, all at once."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import httpx

from lora_serve.common.errors import InternalError
from lora_serve.demo.prompts import BASE_MODEL, PROJECTS, chat_messages, expected_answer

MAX_ANSWER_TOKENS = 48
REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """What one model said to one question.

    Parameters
    ----------
    model
        The name that was sent as `model`.
    project
        The project that was asked for.
    text
        The answer.
    num_prompt_tokens
        Tokens of the prompt, system prompt and chat marks included.
    num_cached_tokens
        Tokens of the prompt that were served from the KV prefix cache.
    elapsed_ms
        From sending the request to the whole answer, with all other requests in flight.
    """

    model: str
    project: str
    text: str
    num_prompt_tokens: int
    num_cached_tokens: int
    elapsed_ms: float

    @property
    def is_right(self) -> bool:
        """The text is, to the letter, what this model was trained to say."""
        return self.text == expected_answer(self.model, self.project)

    def num_reusable_tokens(self, page_size: int) -> int:
        """Tokens of the prompt's whole pages, without the page of the last token where it would be filled.

        The last token of a prompt is always computed, because its logits are needed.
        """
        return (self.num_prompt_tokens - 1) // page_size * page_size


async def _ask(client: httpx.AsyncClient, model: str, project: str) -> Answer:
    body = {
        "model": model,
        "messages": chat_messages(project),
        "temperature": 0,
        "max_tokens": MAX_ANSWER_TOKENS,
    }
    started = time.perf_counter()
    response = await client.post("/v1/chat/completions", json=body)
    elapsed_ms = (time.perf_counter() - started) * 1000
    if response.status_code != httpx.codes.OK:
        raise InternalError(f"model {model!r} answered status {response.status_code}: {response.text}")
    answer = response.json()
    usage = answer["usage"]
    return Answer(
        model=model,
        project=project,
        text=answer["choices"][0]["message"]["content"],
        num_prompt_tokens=usage["prompt_tokens"],
        num_cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        elapsed_ms=elapsed_ms,
    )


async def _ask_all(url: str) -> list[Answer]:
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=REQUEST_TIMEOUT_S) as client:
        pairs = [(model, project) for model in (BASE_MODEL, *PROJECTS) for project in PROJECTS]
        return list(await asyncio.gather(*(_ask(client, model, project) for model, project in pairs)))


def ask_all(url: str) -> list[Answer]:
    """Asks the base model and every adapter for every project in one mixed batch.

    Parameters
    ----------
    url
        The server's root, e.g. ``"http://127.0.0.1:8000"``.

    Returns
    -------
    list of Answer
        20 answers, by model (base first), then by project.

    Raises
    ------
    InternalError
        The server refused a request or could not be reached.
    """
    try:
        return asyncio.run(_ask_all(url))
    except httpx.HTTPError as error:
        raise InternalError(f"the server at {url} did not answer: {error!r}") from error
