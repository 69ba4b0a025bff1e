"""
The C++ core of lora_serve. Imported by lora_serve.scheduler and lora_serve.lora.peft_reader only.
"""

from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing

__all__: list[str] = [
    "AdapterState",
    "AdapterStats",
    "ExecutionEvent",
    "ExecutionPlan",
    "KVEvent",
    "MatrixPlacement",
    "NewRequest",
    "NumbersFound",
    "Scheduler",
    "SchedulerCounters",
    "SchedulerOptions",
    "SchedulerStats",
    "place_matrices",
    "plan_layout",
]

class ExecutionPlan:
    """
    One step of work, as plain arrays.

    Every array is a read-only NumPy view of the plan's memory, without a copy; it keeps the plan alive, and the
    memory given to ``Scheduler.next_plan``. Axis letters: B rows (one a scheduled request), T tokens of the step, L
    ``max_loras``, D page-table deltas, C copies between the tiers. Rows are ordered: decodes first, then prefill
    chunks, both in the order of admission. The copies start before the rows run; until a copy is reported, no row
    writes its source pages or touches its destination pages.

    What the device needs lies in ``block``, for one copy to the device; ``layout`` says where. There the arrays of
    rows and tokens have P entries, not B or T, when the plan is padded for a decode graph
    (``SchedulerOptions.padded_batch_sizes``): padded rows have no token, length 0, no adapter (-1) and the page-table
    row ``max_num_seqs``; padded tokens have id 0, no adapter, and belong to no row and no group. The named views show
    no padding, but ``lora_tiles`` is always as long as the padded sizes ask. Where the arrays of rows, tokens and
    tiles lie depends on ``max_loras`` and the padded sizes only.
    """
    @property
    def active_lora_ids(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [L + 1] int32, adapter slot of each group of tokens, ascending; -1 = the group without adapter (the first one, where it exists), and unused.
        """
    @property
    def adapter_slots(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [B] int32, adapter slot; -1 = no adapter.
        """
    @property
    def block(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [all of it] int32, the memory that holds the arrays named in ``layout``, and nothing else.
        """
    @property
    def delta_offsets(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [D + 1] int32, ``delta_pages[delta_offsets[d]:delta_offsets[d + 1]]`` are the pages of delta d.
        """
    @property
    def delta_pages(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [sum of the deltas] int32, page ids.
        """
    @property
    def delta_rows(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [D] int32, page-table row of each delta.
        """
    @property
    def delta_starts(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [D] int32, first changed entry of the row; entries before it are unchanged.
        """
    @property
    def drained_adapter_ids(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        int64, generations to free; the first of the three.
        """
    @property
    def evicted_adapter_ids(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        int64, generations to take off the device, after the drained ones and before the loads. They may be loaded again.
        """
    @property
    def expired_request_ids(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        int64, requests whose deadline passed before they ran: they have ended, and no ``advance`` is owed for them.
        """
    @property
    def has_rows(self) -> bool:
        """
        Whether any request runs in this step.
        """
    @property
    def header(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [8] int32: rows, tokens, padded rows, padded tokens, deltas, delta pages, groups in use of ``active_lora_ids``, adapters of the step.
        """
    @property
    def is_empty(self) -> bool:
        """
        Whether there is nothing to execute or to report: no ``advance`` is owed.
        """
    @property
    def layout(self) -> dict[str, slice]:
        """
        Where each array lies in ``block``, padded entries included: name to slice.
        """
    @property
    def load_adapter_ids(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        int64, generations to bring to the device.
        """
    @property
    def load_adapter_slots(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        int32, the slot of each generation in ``load_adapter_ids``.
        """
    @property
    def lora_tiles(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [6 * (1 + N) * 3] int32, N = padded tokens // 16 + L + 1; to be seen as [6, 1 + N, 3]: the groups cut into tiles, as ``lora_serve.kernels.lora_tiles.build_lora_tiles`` says. Of each of the six kinds first (tiles, tiles of adapters, 0), then of each tile (first position in ``token_indices_sorted_by_lora_ids``, tokens, adapter slot or -1), those without adapter last; 0 behind the last tile.
        """
    @property
    def lora_token_start_loc(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [L + 2] int32, where each group starts in ``token_indices_sorted_by_lora_ids``; T behind the groups in use.
        """
    @property
    def num_adapters(self) -> int:
        """
        Distinct adapters of the step; 0 = no row has one.
        """
    @property
    def num_cached_tokens(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [B] int32, prompt tokens that came from the prefix cache at the first admission.
        """
    @property
    def num_computed_tokens(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [B] int32, position of the row's first token.
        """
    @property
    def num_padded_rows(self) -> int:
        """
        P, rows with the padded ones; B when nothing is padded.
        """
    @property
    def num_padded_tokens(self) -> int:
        """
        Tokens with the padded ones; T when nothing is padded.
        """
    @property
    def num_scheduled_tokens(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [B] int32, tokens of the row in this step, at least 1.
        """
    @property
    def num_tokens_per_lora(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [L + 1] int32, tokens of each group; 0 where unused.
        """
    @property
    def page_table_rows(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [B] int32, row of the executor's page table, in [0, max_num_seqs).
        """
    @property
    def plan_id(self) -> int:
        """
        Counts up by one from plan to plan; -1 when the plan is empty.
        """
    @property
    def query_start_loc(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [B + 1] int32, row b's tokens are ``query_start_loc[b]:query_start_loc[b + 1]``.
        """
    @property
    def request_ids(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        [B] int64.
        """
    @property
    def samples_token(self) -> numpy.typing.NDArray[numpy.uint8]:
        """
        [B] uint8, 1 when a token is sampled for the row; 0 inside a prefill.
        """
    @property
    def seq_lens(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [B] int32, computed plus scheduled tokens.
        """
    @property
    def token_ids(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [T] int32, input tokens, row after row; -1 = the token sampled by the newest earlier plan with a row of this request.
        """
    @property
    def token_indices_sorted_by_lora_ids(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [T] int32, token positions, stably sorted by adapter slot, those without adapter first.
        """
    @property
    def token_lora_mapping(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [T] int32, adapter slot of each token; -1 = no adapter.
        """
    @property
    def transfer_destination_pages(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [pages of all copies] int32, page ids of the tier that is written.
        """
    @property
    def transfer_ids(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        [C] int64, copies between the tiers, in this order; ids are never reused.
        """
    @property
    def transfer_kinds(self) -> numpy.typing.NDArray[numpy.int8]:
        """
        [C] int8, 0 = write back (device to host), 1 = load back (host to device).
        """
    @property
    def transfer_offsets(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [C + 1] int32, entries ``transfer_offsets[c]:transfer_offsets[c + 1]`` of the two page arrays belong to copy c.
        """
    @property
    def transfer_source_pages(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [pages of all copies] int32, page ids of the tier that is read.
        """

class ExecutionEvent:
    """
    What the executor did with a plan.

    Parameters
    ----------
    plan_id : int
        The plan it answers; -1 = none: then it only reports loads and copies, for those that end while nothing runs.
    sampled_token_ids : array-like of int, [B], range int32
        In the plan's row order; -1 where the row did not sample.
    is_finished : array-like of int or bool, [B]
        1 = the request ends with this token. The scheduler ends it at ``max_tokens`` by itself.
    loaded_adapter_ids, failed_adapter_ids : array-like of int
        Loads of this or an earlier plan that have ended; each is reported once, in one of the two.
    completed_transfer_ids, failed_transfer_ids : array-like of int
        Copies of this or an earlier plan that have ended; each is reported once, in one of the two.

    Raises
    ------
    InvalidArgumentError
        An array is not flat, not of integers, or out of range. Values are copied, never rounded or wrapped.
    """
    def __init__(
        self,
        *,
        plan_id: typing.SupportsInt | typing.SupportsIndex,
        sampled_token_ids: typing.Any = (),
        is_finished: typing.Any = (),
        loaded_adapter_ids: typing.Any = (),
        failed_adapter_ids: typing.Any = (),
        completed_transfer_ids: typing.Any = (),
        failed_transfer_ids: typing.Any = (),
    ) -> None: ...
    @property
    def plan_id(self) -> int: ...

class SchedulerOptions:
    """
    Limits of the scheduler.

    Parameters
    ----------
    num_device_pages : int
        KV pages; at least ``ceil(max_model_len / page_size)``, so that any request can run alone to its end.
    page_size : int
        Tokens of one page.
    max_num_seqs : int
        Requests that may hold a page-table row at once.
    max_num_batched_tokens : int
        Tokens of one step, decodes and prefill chunks together; at least ``max_num_seqs``.
    max_model_len : int
        Prompt and output tokens of one request.
    max_loras : int
        Distinct adapters among the requests that run or were preempted; the base model is not counted.
    enable_prefix_caching : bool
        False: no request starts from another's pages. Preempted requests still recover their own.
    num_host_pages : int
        KV pages of the host tier; 0 = there is none.
    write_policy : str
        When pages are copied to the host: 'write_through' (as soon as they are published), 'write_back' (shortly
        before they would be evicted) or 'off' (only those of preempted requests).
    write_back_watermark_pages : int
        For 'write_back': device pages to be kept free, or evictable without loss. 0 = what a step can take,
        ``max_num_batched_tokens / page_size + max_num_seqs``, but at most a quarter of the device pages.
    adapter_memory_bytes : int
        Bytes of the adapters that are on the device or on their way there, together; 0 = no limit.
    max_loading_adapters : int
        Loads that waiting requests start are under way at once, at least 1.
    loads_staged_only : bool
        Loads wait until the caller has brought the adapter into host memory (``set_adapter_staged``), as it then
        must for those of ``adapters_to_stage``: nobody's room is kept, or taken from others, for weights that are
        still on a disk.
    adapter_patience_us : int
        How long an adapter without room waits before one that has it is paused or closed to newcomers.
    adapter_time_slice_steps : int
        Steps after which an adapter may be paused for one that waits, when as many wait as have room; 0 = never.
    adapter_pause_us : int
        How long a paused adapter waits before another one is paused for it.
    scheduling_policy : str
        Who of the waiting requests of one class of priority goes first: 'fair' (the adapter that has had the fewest
        tokens for its weight), 'fcfs' (in order of arrival) or 'lpm' (the longest cached prefix).
    priority_ageing_us : int
        Waiting this long counts as much as one class of priority, at least 1.
    max_queued_requests, max_queued_tokens : int
        Queued requests, and their prompt tokens, at most; 0 = no limit.
    max_requests_per_adapter : int
        Live requests of one adapter, or of the base model, at most; 0 = no limit.
    padded_batch_sizes : list of int
        Batch sizes of a decode graph, ascending: a plan of decodes only gets empty rows up to the next of them.

    Raises
    ------
    InvalidArgumentError
        A policy has none of its names. Ranges are checked by ``Scheduler``.
    """
    def __init__(
        self,
        *,
        num_device_pages: typing.SupportsInt | typing.SupportsIndex,
        page_size: typing.SupportsInt | typing.SupportsIndex = 16,
        max_num_seqs: typing.SupportsInt | typing.SupportsIndex = 128,
        max_num_batched_tokens: typing.SupportsInt | typing.SupportsIndex = 2048,
        max_model_len: typing.SupportsInt | typing.SupportsIndex = 4096,
        max_loras: typing.SupportsInt | typing.SupportsIndex = 64,
        enable_prefix_caching: bool = True,
        num_host_pages: typing.SupportsInt | typing.SupportsIndex = 0,
        write_policy: str = "write_through",
        write_back_watermark_pages: typing.SupportsInt | typing.SupportsIndex = 0,
        adapter_memory_bytes: typing.SupportsInt | typing.SupportsIndex = 0,
        max_loading_adapters: typing.SupportsInt | typing.SupportsIndex = 4,
        loads_staged_only: bool = False,
        adapter_patience_us: typing.SupportsInt | typing.SupportsIndex = 0,
        adapter_time_slice_steps: typing.SupportsInt | typing.SupportsIndex = 0,
        adapter_pause_us: typing.SupportsInt | typing.SupportsIndex = 75000,
        scheduling_policy: str = "fair",
        priority_ageing_us: typing.SupportsInt | typing.SupportsIndex = 1000000,
        max_queued_requests: typing.SupportsInt | typing.SupportsIndex = 0,
        max_queued_tokens: typing.SupportsInt | typing.SupportsIndex = 0,
        max_requests_per_adapter: typing.SupportsInt | typing.SupportsIndex = 0,
        padded_batch_sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] = [],
    ) -> None: ...
    @property
    def adapter_memory_bytes(self) -> int: ...
    @property
    def adapter_patience_us(self) -> int: ...
    @property
    def adapter_pause_us(self) -> int: ...
    @property
    def adapter_time_slice_steps(self) -> int: ...
    @property
    def enable_prefix_caching(self) -> bool: ...
    @property
    def loads_staged_only(self) -> bool: ...
    @property
    def max_loading_adapters(self) -> int: ...
    @property
    def max_loras(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_queued_requests(self) -> int: ...
    @property
    def max_queued_tokens(self) -> int: ...
    @property
    def max_requests_per_adapter(self) -> int: ...
    @property
    def num_device_pages(self) -> int: ...
    @property
    def num_host_pages(self) -> int: ...
    @property
    def padded_batch_sizes(self) -> list[int]: ...
    @property
    def page_size(self) -> int: ...
    @property
    def priority_ageing_us(self) -> int: ...
    @property
    def scheduling_policy(self) -> str: ...
    @property
    def write_back_watermark_pages(self) -> int: ...
    @property
    def write_policy(self) -> str: ...

class AdapterState:
    """
    Where an adapter's generation stands; compare with ==.

    Members:

      REGISTERED

      LOADING

      RESIDENT

      DRAINING
    """

    DRAINING: typing.ClassVar[AdapterState]
    LOADING: typing.ClassVar[AdapterState]
    REGISTERED: typing.ClassVar[AdapterState]
    RESIDENT: typing.ClassVar[AdapterState]
    __members__: typing.ClassVar[dict[str, AdapterState]]
    @typing.overload
    def __eq__(self, other: AdapterState) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: AdapterState) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class AdapterStats:
    """
    Requests and pages of one adapter generation.
    """
    @property
    def adapter_id(self) -> int: ...
    @property
    def adapter_slot(self) -> int:
        """
        -1 for the base model, and while it is neither on the device nor on its way there.
        """
    @property
    def is_closed(self) -> bool:
        """
        Closed to newcomers until an adapter that has waited for its room got in.
        """
    @property
    def is_paused(self) -> bool:
        """
        Its started requests are left out of the plans for a while.
        """
    @property
    def is_pinned(self) -> bool: ...
    @property
    def load_failed(self) -> bool: ...
    @property
    def num_evictions(self) -> int:
        """
        Times that it was taken off the device to make room.
        """
    @property
    def num_hit_tokens(self) -> int: ...
    @property
    def num_host_pages(self) -> int: ...
    @property
    def num_loads(self) -> int: ...
    @property
    def num_missed_tokens(self) -> int: ...
    @property
    def num_private_pages(self) -> int: ...
    @property
    def num_running_requests(self) -> int: ...
    @property
    def num_scheduled_tokens(self) -> int:
        """
        Prompt tokens computed, and output.
        """
    @property
    def num_started_requests(self) -> int: ...
    @property
    def num_tree_pages(self) -> int: ...
    @property
    def num_waiting_requests(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def state(self) -> AdapterState: ...
    @property
    def total_queue_us(self) -> int:
        """
        From arrival to the first step, of the requests that started.
        """

class SchedulerCounters:
    """
    Counts that cost the same however many adapters and requests there are; ``total_*`` count since the scheduler was made.
    """
    @property
    def num_adapter_bytes(self) -> int:
        """
        Of the resident and the loading ones.
        """
    @property
    def num_adapters_in_line(self) -> int:
        """
        Those with waiting requests that are neither resident nor loading.
        """
    @property
    def num_loading_adapters(self) -> int: ...
    @property
    def num_paused_adapters(self) -> int: ...
    @property
    def num_preempted_requests(self) -> int: ...
    @property
    def num_queued_requests(self) -> int: ...
    @property
    def num_queued_tokens(self) -> int: ...
    @property
    def num_resident_adapters(self) -> int: ...
    @property
    def num_running_requests(self) -> int: ...
    @property
    def total_aborted_requests(self) -> int: ...
    @property
    def total_adapter_evictions(self) -> int: ...
    @property
    def total_adapter_loads(self) -> int: ...
    @property
    def total_adapter_pauses(self) -> int: ...
    @property
    def total_closings(self) -> int:
        """
        Adapters closed to newcomers, added up over the plans.
        """
    @property
    def total_decode_rows(self) -> int: ...
    @property
    def total_expired_requests(self) -> int: ...
    @property
    def total_failed_adapter_loads(self) -> int: ...
    @property
    def total_finished_requests(self) -> int: ...
    @property
    def total_plans(self) -> int: ...
    @property
    def total_preemptions(self) -> int: ...
    @property
    def total_prefill_rows(self) -> int: ...
    @property
    def total_prefill_tokens(self) -> int: ...
    @property
    def total_queue_us(self) -> int:
        """
        From arrival to the first step, of the requests that started.
        """
    @property
    def total_rejected_requests(self) -> int: ...
    @property
    def total_started_requests(self) -> int: ...
    @property
    def total_step_adapters(self) -> int:
        """
        Distinct adapters of each plan, added up.
        """

class SchedulerStats(SchedulerCounters):
    """
    All counts: those of ``SchedulerCounters``, of pages, and of each adapter.
    """
    @property
    def adapters(self) -> list[AdapterStats]:
        """
        list of AdapterStats, ordered by adapter id; the base model (id 0) is the first.
        """
    @property
    def num_available_pages(self) -> int:
        """
        Free, or evictable now: what no request uses.
        """
    @property
    def num_device_pages(self) -> int: ...
    @property
    def num_free_host_pages(self) -> int: ...
    @property
    def num_free_pages(self) -> int: ...
    @property
    def num_host_pages(self) -> int: ...
    @property
    def num_private_pages(self) -> int: ...
    @property
    def num_transfers(self) -> int:
        """
        Copies between the tiers that were started and not reported yet.
        """
    @property
    def num_tree_pages(self) -> int: ...
    @property
    def num_waiting_requests(self) -> int:
        """
        Queued and preempted.
        """
    @property
    def total_evicted_host_pages(self) -> int: ...
    @property
    def total_evicted_pages(self) -> int: ...
    @property
    def total_hit_tokens(self) -> int: ...
    @property
    def total_host_hit_tokens(self) -> int:
        """
        Of ``total_hit_tokens``, those loaded back from the host.
        """
    @property
    def total_queried_tokens(self) -> int: ...

class KVEvent:
    """
    Pages of one namespace that came to a tier or left it. Immutable; any thread may read it.

    A page's hash is a chain over all tokens before it, seeded by the generation's ``digest_seed``.
    """
    @property
    def adapter_id(self) -> int | None:
        """
        The generation, 0 = the base model; None only of removed pages, when it is gone.
        """
    @property
    def is_on_host(self) -> bool:
        """
        Whether it is about the host tier, not the device's.
        """
    @property
    def is_private(self) -> bool:
        """
        Whether only requests of one isolation domain can use the pages; False where the generation is gone.
        """
    @property
    def is_stored(self) -> bool:
        """
        True when the pages came, False when they left.
        """
    @property
    def page_hashes(self) -> list[int]:
        """
        list of int, 64 bits each, in the order of the sequence.
        """
    @property
    def parent_hash(self) -> int | None:
        """
        Hash of the page before the first one; None when that is the first of its sequence.
        """
    @property
    def token_ids(self) -> list[int]:
        """
        list of int, ``page_size`` a page; empty of removed pages.
        """

class NewRequest:
    """
    A request for ``Scheduler.add_request``.

    Parameters
    ----------
    request_id : int
        Unique among the live requests.
    adapter_id : int
        The adapter's generation; 0 = the base model.
    isolation_domain : bytes
        Prefixes are shared within one domain only, whatever the adapter; empty = the default domain.
    prompt_token_ids : array-like of int, range int32
        1 to ``max_model_len - 1`` tokens; copied.
    max_tokens : int
        Output tokens, at least 1; prompt and output together at most ``max_model_len``.
    reuse_prefix : bool
        False when every prompt position must be computed (prompt logprobs).
    priority : int
        Class of priority; lower goes first.
    arrival_us : int or None
        When it arrived, on the clock of ``next_plan``; None = at the last ``next_plan``.
    deadline_us : int or None
        If it has not run by then, on the same clock, it fails; None = it waits as long as it must.

    Raises
    ------
    InvalidArgumentError
        ``prompt_token_ids`` is not a flat array of integers in the range of int32.
    """
    def __init__(
        self,
        *,
        request_id: typing.SupportsInt | typing.SupportsIndex,
        adapter_id: typing.SupportsInt | typing.SupportsIndex,
        prompt_token_ids: typing.Any,
        max_tokens: typing.SupportsInt | typing.SupportsIndex,
        reuse_prefix: bool = True,
        priority: typing.SupportsInt | typing.SupportsIndex = 0,
        arrival_us: typing.SupportsInt | typing.SupportsIndex | None = None,
        deadline_us: typing.SupportsInt | typing.SupportsIndex | None = None,
        isolation_domain: bytes = b"",
    ) -> None: ...
    @property
    def adapter_id(self) -> int: ...
    @property
    def request_id(self) -> int: ...

class Scheduler:
    """
    Decides what runs next: continuous batching over the KV prefix cache, with adapters.

    Not thread-safe. A step is ``plan = next_plan(now)``, then ``advance(event of that plan)``. One more plan may be
    made while one is outstanding; its rows may have input tokens that only the executor will know.

    Parameters
    ----------
    options : SchedulerOptions
        Limits; out-of-range values raise InvalidArgumentError.
    """
    def __init__(self, options: SchedulerOptions) -> None: ...
    def abort(self, request_id: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        End a request wherever it is; returns False when the id is not live (a late abort is normal).
        """
    def adapters_to_stage(self) -> list[int]:
        """
        Give the generations to read into host memory next, the first in front.

        Of those that wait to be loaded, the ones that the next four rounds of loads (of ``max_loading_adapters`` each) bring
        to the device, as far as it holds them all at once, less those that are staged.
        """
    def add_request(self, request: NewRequest) -> None:
        """
        Queue a request.

        Raises
        ------
        InvalidArgumentError
            A field is out of range, or the id is live.
        AdapterNotFoundError
            The generation is not open, is draining, or its load failed.
        CapacityError
            A limit on what waits is reached.
        """
    def add_requests(self, requests: collections.abc.Sequence[NewRequest]) -> None:
        """
        Queue all requests, in their order, or none of them.

        Raises
        ------
        InvalidArgumentError
            A field is out of range, or an id is live or named twice.
        AdapterNotFoundError
            A generation is not open, is draining, or its load failed.
        CapacityError
            With all of them a limit on what waits is exceeded; each counts as rejected.
        """
    def advance(self, event: ExecutionEvent) -> None:
        """
        Take the result of the oldest outstanding plan. The interpreter lock is kept, as in ``next_plan``.

        An event with ``plan_id`` -1 only reports loads and copies; it is taken at any time.

        Raises
        ------
        InvalidArgumentError
            The event does not answer the plan (ids, lengths), or reports a load or a copy that is not under way; nothing
            is changed then.
        """
    def check_invariants(self) -> None:
        """
        Raise InternalError naming what is broken, in the scheduler or its cache; for tests.
        """
    def counters(self) -> SchedulerCounters:
        """
        The counts that cost the same however many adapters and requests there are.
        """
    def drain_adapter(self, adapter_id: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Refuse new requests of the generation; once nothing refers to it, one plan lists it as drained.

        Raises
        ------
        AdapterNotFoundError
            The generation is not open, or is the base model. Draining twice changes nothing.
        """
    def next_plan(
        self, now_us: typing.SupportsInt | typing.SupportsIndex, block: numpy.ndarray | None = None
    ) -> ExecutionPlan:
        """
        Plan one step. The interpreter lock is kept: to get it back would take longer than the step.

        Parameters
        ----------
        now_us : int
            Microseconds of any clock that never goes back.
        block : numpy.ndarray, [plan_block_size or more] int32, contiguous and writable, optional
            Where the plan's ``block`` is written, such as pinned memory; it starts at a multiple of 16 bytes. It must not
            be written again while the plan is read: take one more than plans outstanding, in turn. The plan keeps it
            alive. None: the plan has memory of its own.

        Returns
        -------
        ExecutionPlan
            Owned by the caller; empty when nothing can run, also because all that could waits for the outstanding plan,
            for loads or for copies. An empty plan takes no ``advance``, but may list requests that expired.

        Raises
        ------
        InternalError
            Two earlier non-empty plans were not advanced, or the clock went back.
        InvalidArgumentError
            ``block`` is not such an array; nothing is changed then.
        """
    def open_adapter(
        self,
        adapter_id: typing.SupportsInt | typing.SupportsIndex,
        *,
        digest_seed: typing.SupportsInt | typing.SupportsIndex,
        size_bytes: typing.SupportsInt | typing.SupportsIndex,
        weight: typing.SupportsFloat | typing.SupportsIndex = 1.0,
        is_pinned: bool = False,
        is_staged: bool = False,
    ) -> bool:
        """
        Open a generation with a namespace of its own.

        Parameters
        ----------
        adapter_id : int
            1 or higher, and above every id opened before.
        digest_seed : int
            64 bits that seed the hashes of its KV pages.
        size_bytes : int
            Bytes on the device.
        weight : float
            Its share under the policy 'fair', beside that of others; above 0, at most 1000.
        is_pinned : bool
            Never taken off the device; it is brought in although no request waits for it.
        is_staged : bool
            Its weights lie in host memory; see ``set_adapter_staged``.

        Returns
        -------
        bool
            True when there is room for it without taking another off the device: then the next plan loads it. Else it is
            loaded when requests wait for it, or when it is pinned.

        Raises
        ------
        InvalidArgumentError
            The id is not 1 or higher, or not above every id opened before, or a field is out of range.
        CapacityError
            It can never fit beside the pinned ones.
        """
    def set_adapter_pinned(
        self, adapter_id: typing.SupportsInt | typing.SupportsIndex, is_pinned: bool
    ) -> None:
        """
        Pin a generation to the device, or end that.

        Raises
        ------
        AdapterNotFoundError
            The generation is not open, is draining, has failed to load, or is the base model.
        CapacityError
            With it the pinned ones take so much that another open one could never run.
        """
    def set_adapter_staged(
        self, adapter_id: typing.SupportsInt | typing.SupportsIndex, is_staged: bool
    ) -> None:
        """
        Say whether a generation's weights lie in host memory: then a load takes effect with its plan.

        The rows of the plan that loads it may use it already, and the event of that plan reports the load. If it fails,
        the tokens of these rows mean nothing, and their requests are aborted before the event.

        Raises
        ------
        AdapterNotFoundError
            The generation is not open.
        """
    def set_adapter_weight(
        self,
        adapter_id: typing.SupportsInt | typing.SupportsIndex,
        weight: typing.SupportsFloat | typing.SupportsIndex,
    ) -> None:
        """
        Set a generation's share under the policy 'fair'.

        Raises
        ------
        AdapterNotFoundError
            The generation is not open, or is draining.
        InvalidArgumentError
            The weight is not above 0 and at most 1000.
        """
    def set_events_enabled(self, is_enabled: bool) -> None:
        """
        Note from now on which KV pages come to a tier and leave it, or end that.

        The first events are all pages that are there. Switching off forgets what was not taken. Costs nothing while off.
        """
    def stats(self) -> SchedulerStats:
        """
        All counts; costs in proportion to the adapters.
        """
    def take_events(self) -> list[KVEvent]:
        """
        Give the events since the last call, in order.

        Returns
        -------
        list of KVEvent
            Every page is stored once in a tier and removed once.
        """
    def waiting_adapters(
        self, adapter_ids: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
    ) -> list[int]:
        """
        Give those of ``adapter_ids`` that wait for memory or a place on the device, whose turn comes first in front.

        Unknown ids are left out.
        """
    @property
    def has_work(self) -> bool:
        """
        Whether a request waits or runs, a load or drain is due, or a plan is outstanding. If the plan is empty all the same, and none is outstanding, everything waits for loads and copies to be reported.
        """
    @property
    def options(self) -> SchedulerOptions: ...
    @property
    def plan_block_size(self) -> int:
        """
        Entries of a ``block`` that holds any plan of this scheduler.
        """

class NumbersFound:
    """
    What the numbers of a matrix are; compare with ==.

    Members:

      FINITE

      NOT_FINITE : NaN or infinity is stored.

      TOO_LARGE : What is stored is finite, but too large for the block's format.
    """

    FINITE: typing.ClassVar[NumbersFound]
    NOT_FINITE: typing.ClassVar[NumbersFound]
    TOO_LARGE: typing.ClassVar[NumbersFound]
    __members__: typing.ClassVar[dict[str, NumbersFound]]
    @typing.overload
    def __eq__(self, other: NumbersFound) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: NumbersFound) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class MatrixPlacement:
    """
    Where a matrix lies as it is stored, row by row, and where it goes.

    Parameters
    ----------
    buffer_offset : int
        Bytes from the buffer's start, at any multiple.
    num_rows, num_columns : int
        At least 1 each.
    number_format : str
        ``F32``, ``F16`` or ``BF16``.
    is_transposed : bool
        True: the block has each part's columns as rows.
    parts : list of tuple of int
        Number of rows, and bytes from the block's start, of each matrix of the block that is made of this one, in the
        order of the rows; together they have all of them.

    Raises
    ------
    InvalidArgumentError
        There is no such number format.
    """
    def __init__(
        self,
        *,
        buffer_offset: typing.SupportsInt | typing.SupportsIndex,
        num_rows: typing.SupportsInt | typing.SupportsIndex,
        num_columns: typing.SupportsInt | typing.SupportsIndex,
        number_format: str,
        is_transposed: bool,
        parts: collections.abc.Sequence[
            tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]
        ],
    ) -> None: ...

def place_matrices(
    buffer: numpy.ndarray,
    matrices: collections.abc.Sequence[MatrixPlacement],
    block: numpy.ndarray,
    number_format: str,
) -> list[NumbersFound]:
    """
    Bring matrices from the buffer that they were read into to their places in an adapter's block.

    Each number is converted to the nearest of the block's format, ties to even; what is too large becomes infinite.
    The interpreter lock is released meanwhile; neither array may be written by others.

    Parameters
    ----------
    buffer : numpy.ndarray, uint8, contiguous
        What was read.
    matrices : list of MatrixPlacement
        Their parts do not overlap.
    block : numpy.ndarray, uint8, contiguous and writable
        Bytes outside the parts are not touched.
    number_format : str
        That of the block: ``F32``, ``F16`` or ``BF16``.

    Returns
    -------
    list of NumbersFound
        One a matrix. What one of ``NOT_FINITE`` leaves in its parts means nothing.

    Raises
    ------
    InternalError
        A matrix or a part does not lie in its array, or parts do not have all rows; nothing was written.
    InvalidArgumentError
        An array or the number format is not as described.
    """

def plan_layout(
    max_loras: typing.SupportsInt | typing.SupportsIndex,
    num_padded_rows: typing.SupportsInt | typing.SupportsIndex,
    num_padded_tokens: typing.SupportsInt | typing.SupportsIndex,
) -> dict[str, slice]:
    """
    Where the arrays of a plan of these padded sizes lie in its block, without any page-table delta.

    Parameters
    ----------
    max_loras : int
        As in ``SchedulerOptions``.
    num_padded_rows, num_padded_tokens : int
        As of the plan.

    Returns
    -------
    dict from str to slice
        As ``ExecutionPlan.layout``; only the arrays of deltas may lie elsewhere in a plan.

    Raises
    ------
    InvalidArgumentError
        A size is out of range.
    """
