"""Plans that a CUDA device runs, and what the host learns of them when they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.common.sampling_params import MAX_LOGPROBS
from lora_serve.executor.last_tokens import FAILED
from lora_serve.executor.logprobs import TokenLogprobs, read_logprobs
from lora_serve.executor.pinned_buffers import COPY_ALIGNMENT
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.executor.token_restriction import RestrictionError
from lora_serve.kernels.host_copy import copy_small
from lora_serve.lora.manager import LoadReports

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan

_NO_TOKEN = "the model's logits are not finite, or the step before gave no token to go on from"
_NO_ADJUSTED_TOKEN = f"{_NO_TOKEN}, or logit_bias, min_tokens, penalties and the form leave none to sample"


class ResultBuffers:
    """Pinned memory that sampled tokens and log probabilities are copied to, in turn.

    Parameters
    ----------
    max_rows : int
        Rows of a step.
    num_buffers : int
        Steps that may be on their way.
    device : torch.device
        Where tokens are sampled. On the CPU, which tests use, everything is over when it returns.
    """

    def __init__(self, max_rows: int, num_buffers: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        size = max_rows * (1 + 2 + 2 * MAX_LOGPROBS) + 2 * COPY_ALIGNMENT
        self._buffers = [
            torch.zeros(size, dtype=torch.int32, pin_memory=self._is_cuda) for _ in range(num_buffers)
        ]
        self._next = 0

    def fetch(self, *arrays: Tensor) -> tuple[list[npt.NDArray[np.int32]], torch.cuda.Event | None]:
        """Begin to copy what a step has sampled to the host.

        Parameters
        ----------
        arrays
            int32 on the device, contiguous: tokens, and log probabilities where there are some.

        Returns
        -------
        tuple of list of numpy.ndarray and (torch.cuda.Event or None)
            The same arrays, to be read when the event has come, and until `num_buffers` more calls.
        """
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        results: list[npt.NDArray[np.int32]] = []
        start = 0
        for array in arrays:
            end = start + array.numel()
            copy_small(buffer[start:end], array.view(-1))
            results.append(buffer[start:end].view(array.shape).numpy())
            start = -(-end // COPY_ALIGNMENT) * COPY_ALIGNMENT
        event = None
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return results, event


@dataclass(eq=False)
class PendingStep:
    """A plan that was submitted, and what is known of it.

    Parameters
    ----------
    plan : ExecutionPlan
        Not empty.
    states : sequence of SamplingState
        [B], one a row.
    loads : LoadReports
        Loads that ended when it was submitted.
    row_errors : dict from int to str
        Rows that cannot go on, as far as known.
    logprobs : list of (TokenLogprobs or None)
        [B].
    sampled_rows : numpy.ndarray
        [N] rows that sample.
    tokens : numpy.ndarray
        int32, what they sampled; to be read when `event` has come.
    token_places : numpy.ndarray
        [N], where each sampled row's token stands in `tokens`.
    logprob_rows : list of int
        [L] rows that sample and want log probabilities.
    logprob_entries : numpy.ndarray
        [L, 2 + 2 * K] int32, what `read_logprobs` reads of them; to be read when `event` has come.
    event : torch.cuda.Event or None
        Comes when the step has run; None = nothing has to be waited for.
    error : BaseException or None
        Why the plan could not be begun; None = it was.
    """

    plan: ExecutionPlan
    states: Sequence[SamplingState]
    loads: LoadReports = field(default_factory=LoadReports)
    row_errors: dict[int, str] = field(default_factory=dict)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    sampled_rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    tokens: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    token_places: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    logprob_rows: list[int] = field(default_factory=list)
    logprob_entries: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 2), dtype=np.int32))
    event: torch.cuda.Event | None = None
    error: BaseException | None = None
    _token_ids: npt.NDArray[np.int32] | None = None

    def finish(self) -> npt.NDArray[np.int32]:
        """Wait for the step and take its tokens into the states; twice changes nothing.

        Returns
        -------
        numpy.ndarray
            [B] int32, the sampled tokens; -1 where the row did not sample, and in `row_errors`.
        """
        if self._token_ids is None:
            if self.event is not None:
                self.event.synchronize()
            self._token_ids = self._take_tokens()
        return self._token_ids

    @property
    def num_outputs(self) -> npt.NDArray[np.int64]:
        """[B] tokens that each row's request has sampled before; known before they are."""
        num_prompt_tokens = np.array([state.num_prompt_tokens for state in self.states], dtype=np.int64)
        return self.plan.num_computed_tokens + self.plan.num_scheduled_tokens - num_prompt_tokens

    def _take_tokens(self) -> npt.NDArray[np.int32]:
        plan = self.plan
        token_ids = np.full(len(self.states), -1, dtype=np.int32)
        positions = (plan.num_computed_tokens + plan.num_scheduled_tokens).tolist()
        tokens = self.tokens[self.token_places].tolist()
        for row, token_id in zip(self.sampled_rows.tolist(), tokens, strict=True):
            state, position = self.states[row], positions[row]
            if token_id == FAILED:
                is_adjusted = state.adjusts_logits_at(position - state.num_prompt_tokens)
                self.row_errors.setdefault(row, _NO_ADJUSTED_TOKEN if is_adjusted else _NO_TOKEN)
            if row not in self.row_errors:
                try:
                    state.append_output(token_id, position)
                    token_ids[row] = token_id
                except RestrictionError as error:
                    self.row_errors[row] = str(error)
        self._take_logprobs(token_ids)
        return token_ids

    def _take_logprobs(self, token_ids: npt.NDArray[np.int32]) -> None:
        rows = self.logprob_rows
        if not rows:
            return
        num_top = [self.states[row].params.logprobs or 0 for row in rows]
        entries = read_logprobs(self.logprob_entries, token_ids[rows].tolist(), num_top)
        for row, entry in zip(rows, entries, strict=True):
            if row not in self.row_errors:
                self.logprobs[row] = entry
