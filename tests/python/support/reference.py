"""What transformers and peft answer: the reference of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

TIE_MARGIN = 1e-3
"""Logit distance under which two best tokens count as a tie, so that rounding may choose either."""


@dataclass(frozen=True)
class ReferenceAnswer:
    """Reference for one sequence, computed by one forward pass over its tokens.

    Attributes
    ----------
    best_tokens
        [num_output_tokens]; the reference's greedy choice at each position, given all tokens before it.
    margins
        [num_output_tokens]; best logit minus second-best logit at that position.
    logprobs
        [num_output_tokens]; log-probability of the token that was really emitted.
    best_logprobs
        [num_output_tokens]; log-probability of the reference's own choice.
    """

    best_tokens: np.ndarray
    margins: np.ndarray
    logprobs: np.ndarray
    best_logprobs: np.ndarray


class Reference:
    """One model, optionally with one PEFT adapter.

    Parameters
    ----------
    model_path, adapter_path
        Directories; no adapter = the base model.
    device
        Where it runs. On CUDA in fp32 without TF32.
    weights
        What weights of model and adapter are rounded to.
    compute
        What it computes in.
    """

    def __init__(
        self,
        model_path: str | Path,
        adapter_path: str | Path | None = None,
        *,
        device: str = "cpu",
        weights: torch.dtype = torch.float32,
        compute: torch.dtype = torch.float32,
    ) -> None:
        # On CUDA the plainest attention there is: the fused ones choose their arithmetic by the card.
        attention = "sdpa" if device == "cpu" else "eager"
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=weights, attn_implementation=attention)
        if adapter_path is not None:
            model = PeftModel.from_pretrained(model, str(adapter_path), autocast_adapter_dtype=False)
        self._device = device
        self._model = model.eval().to(device=device, dtype=compute)

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[T, V] fp32 on the CPU: what follows each token."""
        assert not torch.backends.cuda.matmul.allow_tf32
        tokens = torch.tensor([token_ids], device=self._device)
        return self._model(tokens).logits[0].float().cpu()

    def score(self, prompt_token_ids: list[int], output_token_ids: list[int]) -> ReferenceAnswer:
        """Teacher-forced over the given output, so that a tie early on does not hide what follows."""
        logits = self.logits(prompt_token_ids + output_token_ids)
        rows = logits[len(prompt_token_ids) - 1 : -1]
        top = rows.topk(2, dim=-1)
        logprobs = torch.log_softmax(rows.double(), dim=-1)
        emitted = torch.tensor(output_token_ids)
        return ReferenceAnswer(
            best_tokens=top.indices[:, 0].numpy(),
            margins=(top.values[:, 0] - top.values[:, 1]).numpy(),
            logprobs=logprobs.gather(1, emitted[:, None])[:, 0].numpy(),
            best_logprobs=logprobs.amax(dim=-1).numpy(),
        )


def assert_parity(
    reference: Reference,
    prompt_token_ids: list[int],
    output_token_ids: list[int],
    output_logprobs: list[float] | None,
    subject: str,
) -> None:
    """Every token is the reference's best unless the reference is in doubt; every logprob is within 1e-4."""
    answer = reference.score(prompt_token_ids, output_token_ids)
    differs = answer.best_tokens != np.asarray(output_token_ids)
    wrong = np.flatnonzero(differs & (answer.margins > TIE_MARGIN))
    assert wrong.size == 0, (
        f"{subject}: output token {wrong[0]} is {output_token_ids[wrong[0]]}, the reference's best is "
        f"{answer.best_tokens[wrong[0]]} by a margin of {answer.margins[wrong[0]]:.4f}"
    )
    if output_logprobs is None:
        return
    error = np.abs(np.asarray(output_logprobs) - answer.logprobs)
    assert error.max() <= 1e-4, (
        f"{subject}: logprob of output token {error.argmax()} is off by {error.max():.2e}"
    )


@dataclass(frozen=True)
class RoundedAnswer:
    """What an engine of 16 bits has answered.

    Attributes
    ----------
    exact, rounded
        References of the same weights, rounded to the engine's dtype: computing in fp32, and in that dtype.
    prompt, tokens, logprobs
        The prompt, and the answer with the log-probability of each token, where asked for.
    subject
        For the message.
    """

    exact: Reference
    rounded: Reference
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float] | None
    subject: str


RMS_FACTOR = 1.5
MAX_FACTOR = 3.0


def assert_rounding_parity(answers: Sequence[RoundedAnswer]) -> None:
    """The engine is as near to fp32 as transformers is when it computes in the engine's dtype.

    Why this bound: both start from the same weights and round about as often (each product, norm, rotation
    and sum of a layer once, the logits once), in other places and orders. So their errors have the same size
    and are independent. `RMS_FACTOR` leaves room for the places, `MAX_FACTOR` for the largest of a few
    hundred errors. Something wrong (a page, a scaling, a position, a missing module) is an error as large as
    the logits themselves, whose standard deviation is about 3.

    Greedy tokens are the best, or fall behind it by no more than both tokens' logits may be off.
    """
    scored = [(one, *(r.score(one.prompt, one.tokens) for r in (one.exact, one.rounded))) for one in answers]
    allowed = np.concatenate([rounded.logprobs - exact.logprobs for _, exact, rounded in scored])
    allowed_rms, allowed_max = np.sqrt(np.mean(allowed**2)), np.abs(allowed).max()
    found = []
    for one, exact, _ in scored:
        behind = exact.best_logprobs - exact.logprobs
        assert behind.max() <= 2 * MAX_FACTOR * allowed_max, (
            f"{one.subject}: output token {behind.argmax()} is {one.tokens[behind.argmax()]}, which is "
            f"{behind.max():.4f} behind {exact.best_tokens[behind.argmax()]}; transformers' largest error is "
            f"{allowed_max:.4f}"
        )
        if one.logprobs is not None:
            error = np.asarray(one.logprobs) - exact.logprobs
            found.append(error)
            assert np.abs(error).max() <= MAX_FACTOR * allowed_max, (
                f"{one.subject}: logprob of output token {np.abs(error).argmax()} is off by "
                f"{np.abs(error).max():.4f}; transformers' largest error is {allowed_max:.4f}"
            )
    if found:
        rms = np.sqrt(np.mean(np.concatenate(found) ** 2))
        assert rms <= RMS_FACTOR * allowed_rms, (
            f"the root mean square of {sum(map(len, found))} errors is {rms:.5f}, transformers' "
            f"{allowed_rms:.5f}"
        )
