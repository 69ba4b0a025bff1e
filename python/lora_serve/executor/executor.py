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
    from lora_serve.lora.manager import AdapterResidency
    from lora_serve.lora.peft_adapter import HostAdapter
    from lora_serve.scheduler import ExecutionPlan


NO_PLAN = -1
"""`plan_id` of a result that answers no plan."""


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
        Loads of the plan that are now in their slots.
    failed_adapter_ids : dict from int to str
        The plan's other loads, each with the reason.
    row_errors : dict from int to str
        Row to reason, for rows that should have sampled and could not (logits that are not finite). Nothing
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


class AdapterStore(Protocol):
    """Adapter memory as the engine uses it (slots are the executor's matter); really a `LoRAManager`."""

    def read(self, path: str, name: str | None = None) -> HostAdapter:
        """Read and validate a PEFT directory; slow, thread-safe, changes nothing."""
        ...

    def add(self, adapter_id: int, adapter: HostAdapter) -> None:
        """Keep a generation's weights in host memory, so that a plan may load it."""
        ...

    def remove(self, adapter_id: int) -> None:
        """Free a generation everywhere."""
        ...

    def __contains__(self, adapter_id: int) -> bool:
        """Whether the generation is held."""
        ...

    def snapshot(self) -> list[AdapterResidency]:
        """Give what is held, ordered by adapter id."""
        ...


class Executor(Protocol):
    """Runs plans in their order, one at a time, on one thread."""

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

    def execute(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> ExecutionResult:
        """Do what the plan says: drop drained adapters, install loads, copy pages, run the rows, sample.

        Parameters
        ----------
        plan : ExecutionPlan
            Not empty; plans come in order of `plan_id`.
        states : sequence of SamplingState
            [B], one a row. Sampled tokens are appended to `output_token_ids`, and prompt log probabilities
            are written into `prompt_logprobs`; they are complete when the request's first token is sampled.

        Returns
        -------
        ExecutionResult
            Failed loads, failed copies and failed rows are values of it, not exceptions.

        Raises
        ------
        InternalError
            The plan contradicts an earlier one or its states; nothing can be executed any more.
        """
        ...

    def report_copies(self) -> ExecutionResult:
        """Give the copies that have ended since the last result, as the result of no plan.

        For a loop that has no plan to run because everything waits for copies.
        """
        ...

    def close(self) -> None:
        """Free what the executor holds. It takes no plan afterwards; closing twice changes nothing."""
        ...
