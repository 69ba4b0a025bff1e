"""What transformers and peft answer: the reference of the end-to-end tests."""

from __future__ import annotations

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
    """

    best_tokens: np.ndarray
    margins: np.ndarray
    logprobs: np.ndarray


class Reference:
    """One model, optionally with one PEFT adapter, in fp32 on the CPU."""

    def __init__(self, model_path: str | Path, adapter_path: str | Path | None = None) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, attn_implementation="sdpa"
        )
        if adapter_path is not None:
            model = PeftModel.from_pretrained(model, str(adapter_path))
        self._model = model.eval()

    @torch.inference_mode()
    def score(self, prompt_token_ids: list[int], output_token_ids: list[int]) -> ReferenceAnswer:
        """Teacher-forced over the given output, so that a tie early on does not hide what follows."""
        tokens = torch.tensor([prompt_token_ids + output_token_ids])
        logits = self._model(tokens).logits[0].float()
        rows = logits[len(prompt_token_ids) - 1 : -1]
        top = rows.topk(2, dim=-1)
        logprobs = torch.log_softmax(rows.double(), dim=-1)
        emitted = torch.tensor(output_token_ids)
        return ReferenceAnswer(
            best_tokens=top.indices[:, 0].numpy(),
            margins=(top.values[:, 0] - top.values[:, 1]).numpy(),
            logprobs=logprobs.gather(1, emitted[:, None])[:, 0].numpy(),
        )


def assert_parity(
    reference: Reference,
    prompt_token_ids: list[int],
    output_token_ids: list[int],
    output_logprobs: list[float],
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
    error = np.abs(np.asarray(output_logprobs) - answer.logprobs)
    assert error.max() <= 1e-4, (
        f"{subject}: logprob of output token {error.argmax()} is off by {error.max():.2e}"
    )
