"""Is this the answer to that question, from that adapter's content, to the letter?"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from .http_adapters import HttpAdapters
from .http_streams import Heard
from .server_questions import Question, RightAnswer

_GENERATION = re.compile(r"(?P<name>.+)-g(?P<generation>\d+)-(?P<digest>[0-9a-f]{8})")


@dataclass(frozen=True)
class Asked:
    """A question as it was sent.

    Parameters
    ----------
    question, model
        What, and of whom.
    generation
        Of the adapter, as known when it was sent; 0 = the base model.
    num_unloads, num_forced
        How often the adapter had been unloaded by then, and by force.
    """

    question: Question
    model: str
    generation: int
    num_unloads: int
    num_forced: int


class AnswerCheck:
    """Compares answers with those that were learnt before the load.

    Parameters
    ----------
    right
        By content and question.
    content_of_digest
        Content by the first 8 characters of its digest.
    adapters
        What was loaded and unloaded.
    base
        The base model's name.

    Attributes
    ----------
    counts
        Answers by what became of them.
    problems
        What is wrong, a line each.
    """

    def __init__(
        self,
        right: dict[tuple[str, str], RightAnswer],
        content_of_digest: dict[str, str],
        adapters: HttpAdapters,
        base: str,
    ) -> None:
        self._right = right
        self._content_of_digest = content_of_digest
        self._adapters = adapters
        self._base = base
        self._seen: set[tuple[str, int, str]] = set()
        self.counts: Counter[str] = Counter()
        self.num_checked_characters = 0
        self.problems: list[str] = []

    def ask(self, question: Question, model: str) -> Asked:
        """Note what is true when a question is sent."""
        adapters = self._adapters
        generation = 0 if model == self._base else adapters.generations[model]
        return Asked(question, model, generation, adapters.num_unloads[model], adapters.num_forced[model])

    def take(self, asked: Asked, heard: Heard) -> None:
        """Check what came."""
        problem = self._find_problem(asked, heard)
        if problem:
            what = f"{asked.model} (generation {asked.generation} or later), asked {asked.question.key}"
            self.problems.append(f"{what}: {problem}")

    def check_generations(self) -> None:
        """When all loads have been answered: every generation that has answered must be one of them."""
        for name, generation, content in sorted(self._seen):
            loaded = self._adapters.loaded.get((name, generation), "")
            if not loaded.endswith(f"/{content}"):
                self.problems.append(
                    f"generation {generation} of {name} answered with {content!r}, but {loaded!r} was loaded"
                )

    def _find_problem(self, asked: Asked, heard: Heard) -> str:
        if heard.status == 404 and self._adapters.num_unloads[asked.model] > asked.num_unloads:
            self.counts["refused, unloaded"] += 1
            return ""
        if heard.status != 200 or heard.error:
            return f"status {heard.status}, {heard.error}"
        if heard.has_left and not heard.num_events:
            self.counts["left"] += 1
            return ""
        if len(heard.ids) != 1 or len(heard.fingerprints) != 1:
            return f"pieces of several answers: {sorted(heard.ids)}, {sorted(heard.fingerprints)}"
        content = self._content_of(asked, *heard.fingerprints)
        if content is None:
            return f"the fingerprint is {heard.fingerprints}"
        right = self._right[content, asked.question.key]
        self.num_checked_characters += len(heard.text)
        if heard.has_left or heard.finish_reason == "abort":
            return self._check_part(asked, heard, right)
        if not heard.is_done or heard.text != right.text or heard.finish_reason != right.finish_reason:
            end = f"done={heard.is_done}, finish_reason {heard.finish_reason!r}"
            return f"{heard.text!r} ({end}) instead of {right.text!r} ({right.finish_reason})"
        self.counts["answered"] += 1
        return ""

    def _check_part(self, asked: Asked, heard: Heard, right: RightAnswer) -> str:
        if not heard.has_left and self._adapters.num_forced[asked.model] == asked.num_forced:
            return "was aborted, by nobody"
        if not right.text.startswith(heard.text):
            return f"{heard.text!r} is not the beginning of {right.text!r}"
        self.counts["left" if heard.has_left else "aborted by an unload"] += 1
        return ""

    def _content_of(self, asked: Asked, fingerprint: str) -> str | None:
        """Give the content that a fingerprint names; None where it is another's, unknown or outdated."""
        if asked.model == self._base:
            return "" if fingerprint == f"{self._base}-g0" else None
        parts = _GENERATION.fullmatch(fingerprint)
        if parts is None or parts["name"] != asked.model or int(parts["generation"]) < asked.generation:
            return None
        content = self._content_of_digest.get(parts["digest"])
        if content is not None:
            self._seen.add((asked.model, int(parts["generation"]), content))
        return content
