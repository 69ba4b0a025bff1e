"""The interface between the engine and whatever runs its plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from lora_serve.executor.logprobs import TokenLogprobs
from lora_serve.executor.sampling_state import SamplingState

if TYPE_CHECKING:
    from lora_serve.executor.adapter_store import AdapterStore
    from lora_serve.scheduler import ExecutionPlan


NO_PLAN = -1
"""`plan_id` of a result that answers no plan."""


MAX_PLANS_IN_FLIGHT = 2
"""Plans that an executor takes before the result of the first is collected."""


@dataclass(frozen=True)
class ExecutionResult:
    """What an executor did with one plan. Axis B: the plan's rows, in the plan's order.

    Parameters
    ----------
    plan_id : int
        The plan's; NO_PLAN when only copies are reported.
    sampled_token_ids : numpy.ndarray
        [B] int32; -1 where the row did not sample, and in `row_errors`.
    logprobs : list of (TokenLogprobs or None)
        [B]; None where no token was sampled or the request did not ask for them.
    loaded_adapter_ids : list of int
        Loads of this plan, whose adapters are in their slots.
    failed_adapter_ids : dict from int to str
        Loads of this plan that did not happen, each with the reason.
    row_errors : dict from int to str
        Row to reason, for rows that should have sampled and could not: logits that are not finite, or the row
        of the plan before, whose token they start from, has failed, or the load of their adapter has. Nothing
        was appended to their state: their request must be ended, never continued.
    completed_transfer_ids : list of int
        Copies between the tiers, of this plan or an earlier one, that are done since the last result.
    failed_transfer_ids : dict from int to str
        Such copies that did not happen, each with the reason. What they should have written means nothing.
    """

    plan_id: int
    sampled_token_ids: npt.NDArray[np.int32]
    logprobs: list[TokenLogprobs | None]
    loaded_adapter_ids: list[int]
    failed_adapter_ids: dict[int, str]
    row_errors: dict[int, str] = field(default_factory=dict)
    completed_transfer_ids: list[int] = field(default_factory=list)
    failed_transfer_ids: dict[int, str] = field(default_factory=dict)


class Executor(Protocol):
    """Runs plans in their order, one after the other, while its caller does something else.

    One thread calls everything. A plan that was submitted runs until its result is collected; at most
    MAX_PLANS_IN_FLIGHT are on their way. A row's input token may be -1: the token that the row sampled in the
    newest earlier plan that had it, which the executor keeps for each page-table row.
    """

    @property
    def lora(self) -> AdapterStore:
        """The adapter memory."""
        ...

    @property
    def num_device_pages(self) -> int:
        """KV pages, for the scheduler's options."""
        ...

    @property
    def num_host_pages(self) -> int:
        """KV pages of the host tier, for the scheduler's options; 0 = there is none."""
        ...

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer in tokens; `num_device_pages` hold at least one such request."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of logits; valid token ids are in [0, vocab_size)."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The model's end-of-sequence tokens."""
        ...

    @property
    def padded_batch_sizes(self) -> tuple[int, ...]:
        """Sizes that plans of single tokens are to be padded to, ascending; empty = they are not padded."""
        ...

    def submit(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> None:
        """Begin a plan: drop drained adapters, evict, load, copy pages, run the rows, sample; in this order.

        Parameters
        ----------
        plan : ExecutionPlan
            Not empty; plans come in order of `plan_id`. It is read until its result is collected, and not
            after: its memory is used again.
        states : sequence of SamplingState
            [B], one a row. Sampled tokens are appended to `output_token_ids`, and prompt log probabilities
            are written into `prompt_logprobs`; they are complete when the request's first token is sampled.
            They belong to the executor until then: the caller reads nothing that later plans may write.

        Raises
        ------
        InternalError
            There are MAX_PLANS_IN_FLIGHT already, or the executor is closed.
        """
        ...

    def collect(self) -> ExecutionResult:
        """Wait for the oldest plan on its way, and give what became of it.

        Returns
        -------
        ExecutionResult
            Failed loads, failed copies and failed rows are values of it, not exceptions.

        Raises
        ------
        InternalError
            There is no plan on its way; or the plan contradicts an earlier one or its states: nothing can be
            executed any more, and plans submitted after it are not run.
        Exception
            Whatever broke the plan; nothing can be executed any more.
        """
        ...

    def report(self) -> ExecutionResult:
        """Give the copies that have ended since the last result, as the result of no plan.

        For a loop without a plan to run because everything waits for them. While a plan is on its way there
        is nothing to report here: its own result does.
        """
        ...

    def close(self) -> None:
        """Wait for the plan that runs, drop the others, and free what the executor holds.

        It takes no plan afterwards; closing twice changes nothing.
        """
        ...
