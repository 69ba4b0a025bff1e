"""An executor without a model, whose tokens show any wrong page, adapter, delta, copy or order.

Its KV "pages" hold, for each token, what a real page stands for: (adapter, token, position). A row's next
token is a hash of everything that the row reads through the page table, and the page table, the slots and the
pages of both tiers are known only from the plans. `oracle_tokens` gives the same tokens for a request that
runs alone, as a pure function, so any run can be compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lora_serve.common.errors import InternalError
from lora_serve.executor.executor import ExecutionResult
from lora_serve.executor.input_batch import slot_mapping, token_positions
from lora_serve.executor.logprobs import TokenLogprobs
from lora_serve.executor.page_table import PageTable
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.executor.uniform_stream import mix_64
from lora_serve.testing.oracle_adapters import OracleAdapterStore
from lora_serve.testing.oracle_pages import NEVER_WRITTEN, OraclePages

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan

_NO_PLAN = -1


class CopyOutcome(Enum):
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
    failing_adapter_ids : collection of int
        Loads of these generations are reported as failed.
    """

    num_device_pages: int
    page_size: int
    max_num_seqs: int
    max_model_len: int
    vocab_size: int = 1000
    eos_token_ids: tuple[int, ...] = ()
    failing_adapter_ids: Collection[int] = ()
    num_host_pages: int = 0


class OracleExecutor:
    """Runs plans by hashing; see the module's text. Implements `Executor`.

    Owns the pages' contents, the page table and, in `lora`, the map from slots to adapters. Knows no request:
    a token that comes out right was read from the right pages. Every step reads every row completely,
    O(tokens in context), vectorised. `copy_outcome` is asked for each copy under way once a step, lowest id
    first; by default each is done in the step that started it.

    Parameters
    ----------
    options : OracleOptions
        Sizes, as the scheduler has them.
    """

    def __init__(self, options: OracleOptions) -> None:
        self.options = options
        self.lora = OracleAdapterStore()
        max_pages = -(-options.max_model_len // options.page_size)
        self._page_table = PageTable(options.max_num_seqs, max_pages, options.num_device_pages)
        self._pages = OraclePages(options.num_device_pages, options.num_host_pages, options.page_size)
        self.copy_outcome: Callable[[int], CopyOutcome] = lambda transfer_id: CopyOutcome.DONE  # noqa: ARG005

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

    def execute(self, plan: ExecutionPlan, states: Sequence[SamplingState] = ()) -> ExecutionResult:
        """Do what the plan says; see `Executor.execute`.

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
            The plan reads an entry that was never written, or of another adapter or position, writes one
            entry twice, touches what is being copied, or names a slot without an adapter.
        """
        for adapter_id in plan.drained_adapter_ids.tolist():
            if adapter_id in self.lora:
                self.lora.remove(adapter_id)
        loaded, failed = self._load(plan)
        self._pages.start(plan)
        self._page_table.apply_deltas(plan)
        num_rows = len(plan.request_ids)
        tokens = np.full(num_rows, -1, dtype=np.int32)
        logprobs: list[TokenLogprobs | None] = [None] * num_rows
        if num_rows:
            hashes = self._write_and_read(plan)
            samples = plan.samples_token.astype(bool)
            tokens[samples] = _tokens_of(hashes[samples], self.options.vocab_size)
        for row, state in enumerate(states):
            logprobs[row] = _update_state(state, plan, row, int(tokens[row]))
        return self._with_copies(ExecutionResult(plan.plan_id, tokens, logprobs, loaded, failed))

    def report_copies(self) -> ExecutionResult:
        """Give the copies that end now, as the result of no plan (`plan_id` -1)."""
        return self._with_copies(ExecutionResult(_NO_PLAN, np.empty(0, dtype=np.int32), [], [], {}))

    def close(self) -> None:
        """Nothing to free."""

    def _with_copies(self, result: ExecutionResult) -> ExecutionResult:
        for transfer_id in self._pages.copies_under_way:
            outcome = self.copy_outcome(transfer_id)
            if outcome is CopyOutcome.UNDER_WAY:
                continue
            self._pages.end(transfer_id, failed=outcome is CopyOutcome.FAILED)
            if outcome is CopyOutcome.FAILED:
                result.failed_transfer_ids[transfer_id] = f"copy {transfer_id} is set up to fail"
            else:
                result.completed_transfer_ids.append(transfer_id)
        return result

    def _load(self, plan: ExecutionPlan) -> tuple[list[int], dict[int, str]]:
        loaded: list[int] = []
        failed: dict[int, str] = {}
        loads = zip(plan.load_adapter_ids.tolist(), plan.load_adapter_slots.tolist(), strict=True)
        for adapter_id, slot in loads:
            if adapter_id in self.options.failing_adapter_ids:
                failed[adapter_id] = f"adapter {adapter_id} is set up to fail"
            else:
                self.lora.install(adapter_id, slot)
                loaded.append(adapter_id)
        return loaded, failed

    def _adapters_of(self, plan: ExecutionPlan) -> npt.NDArray[np.int64]:
        """[B] adapter of each row, 0 = base."""
        in_slot: dict[int, int | None] = {
            slot: self.lora.adapter_in(slot) for slot in set(plan.adapter_slots.tolist())
        }
        in_slot[-1] = 0
        adapters = [in_slot[slot] for slot in plan.adapter_slots.tolist()]
        if None in adapters:
            slot = plan.adapter_slots[adapters.index(None)]
            raise InternalError(f"plan {plan.plan_id} uses adapter slot {slot}, which holds no adapter")
        return np.array(adapters, dtype=np.int64)

    def _write_and_read(self, plan: ExecutionPlan) -> npt.NDArray[np.uint64]:
        """Write the step's tokens, then hash what each row reads: [B] uint64."""
        page_size = self.options.page_size
        adapters = self._adapters_of(plan)
        seq_lens = (plan.num_computed_tokens + plan.num_scheduled_tokens).astype(np.int64)
        row_pages = self._page_table.rows(plan.page_table_rows, (-(-seq_lens // page_size)).astype(np.int32))

        token_rows, positions = token_positions(plan)
        if len(token_rows) != len(plan.token_ids) or plan.token_ids.min() < 0:
            raise InternalError(f"plan {plan.plan_id} has {len(token_rows)} tokens, ids {plan.token_ids}")
        slots = slot_mapping(row_pages, token_rows, positions, page_size)
        if len(np.unique(slots)) != len(slots):
            raise InternalError(f"plan {plan.plan_id} writes an entry twice: {sorted(slots.tolist())}")
        self._pages.write(slots, adapters[token_rows], plan.token_ids, positions)

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
        entries = _entry_hashes(adapters[read_rows], found_tokens, read_positions)
        hashes: npt.NDArray[np.uint64] = np.add.reduceat(entries, row_starts)
        return hashes


def oracle_tokens(
    adapter_id: int, prompt_token_ids: Iterable[int], max_tokens: int, vocab_size: int = 1000
) -> list[int]:
    """Tokens that a request gets when it runs alone.

    Parameters
    ----------
    adapter_id : int
        The generation; 0 = the base model.
    prompt_token_ids : iterable of int
        At least one token.
    max_tokens : int
        Tokens to give.
    vocab_size : int
        As in `OracleOptions`.

    Returns
    -------
    list of int
        [max_tokens], each in [0, vocab_size).

    Notes
    -----
    O(prompt + max_tokens); does not share any state or page with an `OracleExecutor`.
    """
    prompt = np.array(list(prompt_token_ids), dtype=np.int64)
    adapters = np.full(len(prompt), adapter_id, dtype=np.int64)
    total = _entry_hashes(adapters, prompt, np.arange(len(prompt))).sum(keepdims=True)
    tokens: list[int] = []
    for index in range(max_tokens):
        tokens.append(int(_tokens_of(total, vocab_size)[0]))
        newest = np.array([tokens[-1]], dtype=np.int64)
        total = total + _entry_hashes(adapters[:1], newest, np.array([len(prompt) + index]))
    return tokens


def _entry_hashes(
    adapters: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """One hash an entry; their sum modulo 2**64 is the hash of a sequence, since each holds its position."""
    inner = mix_64(adapters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + tokens.astype(np.uint64))
    return mix_64(inner + positions.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03))


def _tokens_of(hashes: npt.NDArray[np.uint64], vocab_size: int) -> npt.NDArray[np.int32]:
    tokens: npt.NDArray[np.int32] = (mix_64(hashes) % np.uint64(vocab_size)).astype(np.int32)
    return tokens


def _update_state(state: SamplingState, plan: ExecutionPlan, row: int, token_id: int) -> TokenLogprobs | None:
    """Append the row's token, if it has one, and fill the prompt log probabilities that the step computed."""
    computed = int(plan.num_computed_tokens[row])
    end = computed + int(plan.num_scheduled_tokens[row])
    if state.prompt_logprobs is not None:
        for position in range(computed + 1, min(end + 1, state.num_prompt_tokens)):
            state.prompt_logprobs[position] = _certain(
                int(state.prompt_token_ids[position]), state.params.prompt_logprobs or 0
            )
    if token_id < 0:
        return None
    state.append_output(token_id, end)
    return None if state.params.logprobs is None else _certain(token_id, state.params.logprobs)


def _certain(token_id: int, num_top: int) -> TokenLogprobs:
    num_listed = min(num_top, 1)
    return TokenLogprobs(
        token_id=token_id,
        logprob=0.0,
        rank=1,
        top_token_ids=np.full(num_listed, token_id, dtype=np.int32),
        top_logprobs=np.zeros(num_listed, dtype=np.float32),
    )
