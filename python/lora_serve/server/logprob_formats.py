"""Log probabilities in the two formats of OpenAI's interface."""

from __future__ import annotations

from collections.abc import Sequence

from lora_serve.common.outputs import Logprob
from lora_serve.engine.tokenizer import Tokenizer
from lora_serve.server.protocol.chat import ChatLogprobs, TokenLogprob, TopLogprob
from lora_serve.server.protocol.completion import CompletionLogprobs
from lora_serve.server.protocol.generation import PromptLogprob, PromptLogprobs

LOWEST_LOGPROB = -9999.0
"""Written for a probability of zero: JSON has no infinity."""
_REPLACEMENT = "\ufffd"


class LogprobFormatter:
    """Writes the log probabilities of tokens.

    Parameters
    ----------
    tokenizer : Tokenizer
        Gives the text of tokens that nobody has decoded yet.
    num_top : int
        Most probable tokens to show at a position.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top

    def for_completion(
        self,
        token_ids: Sequence[int],
        positions: Sequence[dict[int, Logprob] | None],
        text_offsets: Sequence[int],
    ) -> CompletionLogprobs:
        """Write parallel lists; `top_logprobs` always holds the sampled token too, as OpenAI has it.

        Parameters
        ----------
        token_ids : sequence of int
            The tokens.
        positions : sequence of (dict from int to Logprob, or None)
            One entry a token; None for the first token of a prompt, which nothing precedes.
        text_offsets : sequence of int
            Where each token's text starts in the choice's text, in characters.
        """
        answer = CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[], text_offset=list(text_offsets)
        )
        for token_id, position in zip(token_ids, positions, strict=True):
            text = self._text(token_id, position)
            answer.tokens.append(text)
            if position is None:
                answer.token_logprobs.append(None)
                answer.top_logprobs.append(None)
                continue
            answer.token_logprobs.append(finite_logprob(position[token_id].logprob))
            shown = self._most_probable(position)
            if token_id not in shown:
                shown.append(token_id)
            top: dict[str, float] = {}
            for shown_id in shown:
                # Different tokens may have the same text; the more probable one is kept.
                top.setdefault(self._text(shown_id, position), finite_logprob(position[shown_id].logprob))
            answer.top_logprobs.append(top)
        return answer

    def for_chat(self, token_ids: Sequence[int], positions: Sequence[dict[int, Logprob]]) -> ChatLogprobs:
        """Write one entry a token, each with exactly the most probable tokens that were asked for.

        Parameters
        ----------
        token_ids : sequence of int
            The tokens.
        positions : sequence of dict from int to Logprob
            One entry a token.
        """
        content = [
            TokenLogprob(
                **dict(self._top_logprob(token_id, position)),
                top_logprobs=[
                    self._top_logprob(top_id, position) for top_id in self._most_probable(position)
                ],
            )
            for token_id, position in zip(token_ids, positions, strict=True)
        ]
        return ChatLogprobs(content=content, refusal=None)

    def for_prompt(
        self, token_ids: Sequence[int], positions: Sequence[dict[int, Logprob] | None], num_top: int
    ) -> PromptLogprobs:
        """Write the prompt's log probabilities as vLLM does: by token id, the prompt's own token first.

        Parameters
        ----------
        token_ids : sequence of int
            The prompt.
        positions : sequence of (dict from int to Logprob, or None)
            One entry a token; None for the first.
        num_top : int
            Most probable tokens to show at a position.
        """
        entries: PromptLogprobs = []
        for token_id, position in zip(token_ids, positions, strict=True):
            if position is None:
                entries.append(None)
                continue
            shown = dict.fromkeys([token_id, *_best(position, num_top)])
            entries.append(
                {
                    shown_id: PromptLogprob(
                        logprob=finite_logprob(position[shown_id].logprob),
                        rank=position[shown_id].rank,
                        decoded_token=self._text(shown_id, position),
                    )
                    for shown_id in shown
                }
            )
        return entries

    def _most_probable(self, position: dict[int, Logprob]) -> list[int]:
        """Give the ids of the most probable tokens, best first; the sampled one only if it is among them."""
        return _best(position, self._num_top)

    def _top_logprob(self, token_id: int, position: dict[int, Logprob]) -> TopLogprob:
        text = self._text(token_id, position)
        # Part of a character has no text of its own, and its bytes cannot be told from the text.
        raw = None if _REPLACEMENT in text else list(text.encode())
        return TopLogprob(token=text, logprob=finite_logprob(position[token_id].logprob), bytes=raw)

    def _text(self, token_id: int, position: dict[int, Logprob] | None) -> str:
        decoded = None if position is None else position[token_id].decoded_token
        return self._tokenizer.decode_token(token_id) if decoded is None else decoded


def join_completion_logprobs(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Give the entries of both, in order."""
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def _best(position: dict[int, Logprob], num_top: int) -> list[int]:
    return sorted(position, key=lambda token_id: (position[token_id].rank, token_id))[:num_top]


def finite_logprob(logprob: float) -> float:
    """Give a log probability that JSON can carry."""
    return max(logprob, LOWEST_LOGPROB)
