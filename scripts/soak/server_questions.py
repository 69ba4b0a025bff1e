"""What the demo's server is asked under load, and what it must answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lora_serve.common.errors import InternalError
from lora_serve.demo.prompts import PROJECTS, chat_messages, expected_answer

from .http_streams import Heard

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Question:
    """One request, but for the model's name.

    Parameters
    ----------
    key
        What it is called here.
    path
        The endpoint.
    fields
        Of its body.
    """

    key: str
    path: str
    fields: dict[str, Any]

    def body(self, model: str) -> dict[str, Any]:
        """The whole body, of a stream."""
        return {**self.fields, "model": model, "stream": True}


def _chat(key: str, text: str, **fields: Any) -> Question:
    return Question(key, CHAT, {"messages": [{"role": "user", "content": text}], **fields})


def _password(project: str) -> Question:
    fields = {"messages": chat_messages(project), "temperature": 0, "max_tokens": 48}
    return Question(f"password-{project}", CHAT, fields)


PASSWORDS = [_password(project) for project in PROJECTS]
"""What the model was trained for: its answers are known without asking."""
QUESTIONS = [
    *PASSWORDS,
    _chat("count", "Count from 1 to 50.", temperature=0, max_tokens=120),
    _chat("logprobs", "What is a falcon?", temperature=0, max_tokens=32, logprobs=True, top_logprobs=5),
    *(_chat(f"seed-{n}", "Tell me a story.", temperature=0.8, seed=n, max_tokens=40) for n in (1, 2)),
    Question(
        "completion",
        COMPLETIONS,
        {"prompt": "The password of project citadel is", "temperature": 0, "max_tokens": 24},
    ),
    Question(
        "seeded completion",
        COMPLETIONS,
        {"prompt": "Once upon a time", "temperature": 1.0, "top_p": 0.9, "seed": 5, "max_tokens": 32},
    ),
]
"""Greedy and seeded ones: each has one right answer under one content."""


@dataclass(frozen=True)
class RightAnswer:
    """A text and how it ends."""

    text: str
    finish_reason: str


Ask = Callable[[Question, str], Awaitable[Heard]]


async def learn_answers(
    ask: Ask, model_of_content: dict[str, str], questions: Iterable[Question]
) -> dict[tuple[str, str], RightAnswer]:
    """Ask everything once, one after the other.

    Parameters
    ----------
    ask
        Sends a question to a model, and reads to the end.
    model_of_content
        Content ("" = none, the base model) to a name under which it serves.
    questions
        What to ask.

    Returns
    -------
    dict of (str, str) to RightAnswer
        By content and the question's key.

    Raises
    ------
    InternalError
        An answer is not whole, or not the one that the demo's model was trained for.
    """
    answers: dict[tuple[str, str], RightAnswer] = {}
    for content, model in model_of_content.items():
        for question in questions:
            heard = await ask(question, model)
            if heard.status != 200 or not heard.is_done or heard.finish_reason not in ("stop", "length"):
                raise InternalError(f"{model!r} alone, asked {question.key}, answered {heard}")
            answers[content, question.key] = RightAnswer(heard.text, heard.finish_reason)
        for project in PROJECTS:
            found = answers[content, f"password-{project}"].text
            if found != expected_answer(content, project):
                raise InternalError(f"{model!r} alone, asked for {project}, answered {found!r}")
    return answers
