"""An executor without a model, whose tokens show any wrong page, adapter, delta, copy or order.

Its KV "pages" hold, for each token, what a real page stands for: (adapter, token, position). A row's next
token is a hash of everything that the row reads through the page table, and the page table, the slots and the
pages of both tiers are known only from the plans. `oracle_tokens` gives the same tokens for a request that
runs alone, as a pure function, so any run can be compared with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lora_serve.common.errors import InternalError
from lora_serve.executor.executor import MAX_PLANS_IN_FLIGHT, NO_PLAN, ExecutionResult
from lora_serve.executor.input_batch import slot_mapping, token_positions
from lora_serve.executor.last_tokens import UNKNOWN, LastSampledTokens
from lora_serve.executor.page_table import PageTable
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.testing.oracle_adapters import OracleAdapterStore
from lora_serve.testing.oracle_pages import NEVER_WRITTEN, OraclePages
from lora_serve.testing.oracle_states import update_state
from lora_serve.testing.oracle_tokens import entry_hashes, tokens_of

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan


class Outcome(Enum):
    """What became of a copy between the tiers in one step."""

    DONE = "done"
    UNDER_WAY = "under way"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class OracleOptions:
    """Sizes of the machine that the oracle stands for; names and meanings as in `SchedulerOptions`.

    Parameters
    ----------
    num_device_pages, page_size, max_num_seqs, max_model_len, num_host_pages : int
        As the scheduler's.
    vocab_size : int
        Tokens are in [0, vocab_size).
    eos_token_ids : tuple of int
        Reported to the engine; the oracle draws them like any other token.
    adapter_memory_bytes : int
        Bytes of the adapters on the device, at most; 0 = any number.
    """

    num_device_pages: int
    page_size: int
    max_num_seqs: int
    max_model_len: int
    vocab_size: int = 1000
    eos_token_ids: tuple[int, ...] = ()
    num_host_pages: int = 0
    adapter_memory_bytes: int = 0


class OracleExecutor:
    """Runs plans by hashing; see the module's text. Implements `Executor`.

    Owns the pages' contents, the page table, the last token of each row and, in `lora`, the map from slots to
    adapters. Knows no request: a token that comes out right was read from the right pages. A plan runs when
    its result is collected, as late as it may: what its arrays say, and what they refer to, must hold until
    then. Every step reads every row completely, O(tokens in context), vectorised.

    Parameters
    ----------
    options : OracleOptions
        Sizes, as the scheduler has them.

    Attributes
    ----------
    copy_outcome : callable
        Asked for each copy under way, by transfer id, once a step, lowest id first, after the step's rows.
        By default each is done in the step that began it.
    load_fails : callable
        Asked for each load, by adapter id, lowest first, before the rows of its plan. By default none does.
    """

    def __init__(self, options: OracleOptions) -> None:
        self.options = options
        self.lora = OracleAdapterStore(memory_bytes=options.adapter_memory_bytes)
        max_pages = -(-options.max_model_len // options.page_size)
        self._page_table = PageTable(options.max_num_seqs, max_pages, options.num_device_pages)
        self._pages = OraclePages(options.num_device_pages, options.num_host_pages, options.page_size)
        self._last_tokens = LastSampledTokens(options.max_num_seqs)
        self._failed_slots: dict[int, int] = {}
        self._in_flight: deque[tuple[ExecutionPlan, Sequence[SamplingState]]] = deque()
        self.copy_outcome: Callable[[int], Outcome] = lambda transfer_id: Outcome.DONE  # noqa: ARG005
        self.load_fails: Callable[[int], bool] = lambda adapter_id: False  # noqa: ARG005

    @property
    def num_device_pages(self) -> int:
        """KV pages."""
        return self.options.num_device_pages

    @property
    def num_host_pages(self) -> int:
        """KV pages of the host tier."""
        return self.options.num_host_pages

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer in tokens."""
        return self.options.max_model_len

    @property
    def vocab_size(self) -> int:
        """Tokens are in [0, vocab_size)."""
        return self.options.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence tokens."""
        return self.options.eos_token_ids

    @property
    def padded_batch_sizes(self) -> tuple[int, ...]:
        """None: plans are not padded."""
        return ()

    def submit(self, plan: ExecutionPlan, states: Sequence[SamplingState] = ()) -> None:
        """Take a plan; see `Executor.submit`.

        Parameters
        ----------
        plan : ExecutionPlan
            Not empty.
        states : sequence of SamplingState
            [B], or empty to drive the oracle without an engine. Log probabilities, where asked for, are those
            of a model that is certain: 0, rank 1.

        Raises
        ------
        InternalError
            There are MAX_PLANS_IN_FLIGHT already.
        """
        if len(self._in_flight) >= MAX_PLANS_IN_FLIGHT:
            raise InternalError(
                f"plan {plan.plan_id} was submitted while {len(self._in_flight)} plans are on their way"
            )
        self._in_flight.append((plan, states))

    def collect(self) -> ExecutionResult:
        """Run the oldest plan on its way; see `Executor.collect`.

        Raises
        ------
        InternalError
            The plan reads an entry that was never written, or of another adapter or position, writes one
            entry twice, touches what is being copied, names a slot without an adapter, or brings more
            adapters to the device than it holds. Or no plan is on its way.
        """
        if not self._in_flight:
            raise InternalError("a result was asked for while no plan is on its way")
        plan, states = self._in_flight.popleft()
        return self.run_plan(plan, states)

    def report(self) -> ExecutionResult:
        """Give the copies that end now, as the result of no plan."""
        result = ExecutionResult(NO_PLAN, np.empty(0, dtype=np.int32), [], [], {})
        if not self._in_flight:
            self._end_copies(result)
        return result

    def close(self) -> None:
        """Drop the plans on their way."""
        self._in_flight.clear()

    # --- One plan -----------------------------------------------------------------------------------------

    def run_plan(self, plan: ExecutionPlan, states: Sequence[SamplingState]) -> ExecutionResult:
        """Do what a plan says, now; for classes that change how plans run."""
        for adapter_id in plan.drained_adapter_ids.tolist():
            self.lora.free(adapter_id)
        for adapter_id in plan.evicted_adapter_ids.tolist():
            if adapter_id not in self._failed_slots.values():  # Or the plan was made before that was known.
                self.lora.evict(adapter_id)
        result = ExecutionResult(
            plan.plan_id, np.full(len(plan.request_ids), -1, dtype=np.int32), [None] * len(states), [], {}
        )
        self._load(plan, result)
        self._pages.start(plan)
        self._page_table.apply_deltas(plan)
        if plan.has_rows:
            result.row_errors.update(self._run_rows(plan, result.sampled_token_ids))
        for row, state in enumerate(states):
            result.logprobs[row] = update_state(state, plan, row, int(result.sampled_token_ids[row]))
        self._end_copies(result)
        return result

    def find_row_errors(self, plan: ExecutionPlan) -> dict[int, str]:  # noqa: ARG002
        """Give the rows that fail although their pages are right, with reasons; none, but classes may."""
        return {}

    def _load(self, plan: ExecutionPlan, result: ExecutionResult) -> None:
        slot_of = dict(zip(plan.load_adapter_ids.tolist(), plan.load_adapter_slots.tolist(), strict=True))
        for adapter_id, slot in slot_of.items():
            self.lora.load(adapter_id, slot)
            self._failed_slots.pop(slot, None)
        limit = self.options.adapter_memory_bytes
        if limit and self.lora.num_device_bytes > limit:
            raise InternalError(
                f"plan {plan.plan_id} brings the adapters on the device to {self.lora.num_device_bytes} "
                f"bytes but it holds {limit}"
            )
        for adapter_id, slot in sorted(slot_of.items()):
            if self.load_fails(adapter_id):
                self.lora.evict(adapter_id)
                result.failed_adapter_ids[adapter_id] = f"adapter {adapter_id} is set up to fail"
                self._failed_slots[slot] = adapter_id
            else:
                result.loaded_adapter_ids.append(adapter_id)

    def _end_copies(self, result: ExecutionResult) -> None:
        for transfer_id in self._pages.copies_under_way:
            outcome = self.copy_outcome(transfer_id)
            if outcome is Outcome.UNDER_WAY:
                continue
            self._pages.end(transfer_id, failed=outcome is Outcome.FAILED)
            if outcome is Outcome.FAILED:
                result.failed_transfer_ids[transfer_id] = f"copy {transfer_id} is set up to fail"
            else:
                result.completed_transfer_ids.append(transfer_id)

    def _adapters_of(self, plan: ExecutionPlan) -> npt.NDArray[np.int64]:
        """[B] adapter of each row, 0 = base."""
        in_slot: dict[int, int | None] = {
            slot: self.lora.adapter_in(slot) for slot in set(plan.adapter_slots.tolist())
        }
        # Rows of those whose load has failed run, and fail.
        in_slot.update({s: i for s, i in self._failed_slots.items() if in_slot.get(s) is None})
        in_slot[-1] = 0
        adapters = [in_slot[slot] for slot in plan.adapter_slots.tolist()]
        if None in adapters:
            slot = plan.adapter_slots[adapters.index(None)]
            raise InternalError(f"plan {plan.plan_id} uses adapter slot {slot}, which holds no adapter")
        return np.array(adapters, dtype=np.int64)

    def _run_rows(self, plan: ExecutionPlan, tokens: npt.NDArray[np.int32]) -> dict[int, str]:
        """Fill in the tokens of the rows that sample; give the failed rows."""
        input_tokens = plan.token_ids.astype(np.int64)
        without_input = self._last_tokens.fill(input_tokens, plan)
        hashes = self._write_and_read(plan, input_tokens)
        row_errors = self.find_row_errors(plan)
        for row, slot in enumerate(plan.adapter_slots.tolist()):
            if slot in self._failed_slots and plan.samples_token[row]:
                row_errors[row] = "its adapter could not be brought to the device"
        row_errors.update(dict.fromkeys(without_input, "the step before gave no token to go on from"))
        samples = plan.samples_token.astype(bool)
        samples[list(row_errors)] = False
        tokens[samples] = tokens_of(hashes[samples], self.options.vocab_size)
        self._last_tokens.note(plan, tokens)
        return row_errors

    def _write_and_read(
        self, plan: ExecutionPlan, input_tokens: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint64]:
        """Write the step's tokens, then hash what each row reads: [B] uint64."""
        page_size = self.options.page_size
        adapters = self._adapters_of(plan)
        seq_lens = (plan.num_computed_tokens + plan.num_scheduled_tokens).astype(np.int64)
        row_pages = self._page_table.rows(plan.page_table_rows, (-(-seq_lens // page_size)).astype(np.int32))

        token_rows, positions = token_positions(plan)
        if len(token_rows) != len(input_tokens) or plan.token_ids.min() < UNKNOWN:
            raise InternalError(f"plan {plan.plan_id} has {len(token_rows)} tokens, ids {plan.token_ids}")
        slots = slot_mapping(row_pages, token_rows, positions, page_size)
        if len(np.unique(slots)) != len(slots):
            raise InternalError(f"plan {plan.plan_id} writes an entry twice: {sorted(slots.tolist())}")
        self._pages.write(slots, adapters[token_rows], input_tokens, positions)

        read_rows = np.repeat(np.arange(len(seq_lens)), seq_lens)
        row_starts = np.cumsum(seq_lens) - seq_lens
        read_positions = np.arange(len(read_rows)) - row_starts[read_rows]
        read_slots = slot_mapping(row_pages, read_rows, read_positions, page_size)
        found_adapters, found_tokens, found_positions = self._pages.read(read_slots)
        wrong = (found_adapters != adapters[read_rows]) | (found_positions != read_positions)
        if wrong.any():
            index = int(wrong.argmax())
            row, page = int(read_rows[index]), int(read_slots[index]) // page_size
            adapter, position = int(found_adapters[index]), int(found_positions[index])
            found = (
                "was never written"
                if adapter <= NEVER_WRITTEN
                else f"holds position {position} of adapter {adapter}"
            )
            raise InternalError(
                f"plan {plan.plan_id}, request {plan.request_ids[row]}: the entry read for position "
                f"{read_positions[index]} of adapter {adapters[row]} (page {page}) {found}"
            )
        entries = entry_hashes(adapters[read_rows], found_tokens, read_positions)
        hashes: npt.NDArray[np.uint64] = np.add.reduceat(entries, row_starts)
        return hashes
