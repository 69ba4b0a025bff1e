"""
The C++ core of lora_serve. Imported by lora_serve.scheduler only.
"""

from __future__ import annotations
import numpy
import numpy.typing
import typing

__all__: list[str] = [
    "AdapterState",
    "AdapterStats",
    "ExecutionEvent",
    "ExecutionPlan",
    "NewRequest",
    "Scheduler",
    "SchedulerOptions",
    "SchedulerStats",
]

class ExecutionPlan:
    """
    One step of work, as plain arrays.

    Every array is a read-only NumPy view of the plan's memory, without a copy; it keeps the plan alive.
    Axis letters: B rows (one a scheduled request), T tokens of the step, D page-table deltas, C copies between the
    tiers. Rows are ordered: decodes first, then prefill chunks, both in the order of admission. The copies start
    before the rows run; until a copy is reported, no row writes its source pages or touches its destination pages.
    """
    @property
    def adapter_slots(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [B] int32, adapter slot; -1 = no adapter.
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
        int64, generations to free, before the loads.
        """
    @property
    def has_rows(self) -> bool:
        """
        Whether any request runs in this step.
        """
    @property
    def is_empty(self) -> bool:
        """
        Whether there is nothing to execute or to report: no ``advance`` is owed.
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
    def num_scheduled_tokens(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [B] int32, tokens of the row in this step, at least 1.
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
    def token_ids(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        [T] int32, input tokens, row after row.
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
        The plan it answers; -1 = none: then it only reports copies, for those that end while nothing runs.
    sampled_token_ids : array-like of int, [B], range int32
        In the plan's row order; -1 where the row did not sample.
    is_finished : array-like of int or bool, [B]
        1 = the request ends with this token. The scheduler ends it at ``max_tokens`` by itself.
    loaded_adapter_ids, failed_adapter_ids : array-like of int
        The generations of the plan's loads, each in exactly one of the two.
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
        Distinct adapters among the started requests; the base model is not counted.
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

    Raises
    ------
    InvalidArgumentError
        ``write_policy`` is none of the three. Ranges are checked by ``Scheduler``.
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
    ) -> None: ...
    @property
    def enable_prefix_caching(self) -> bool: ...
    @property
    def max_loras(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def num_device_pages(self) -> int: ...
    @property
    def num_host_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def write_back_watermark_pages(self) -> int: ...
    @property
    def write_policy(self) -> str: ...

class NewRequest:
    """
    A request for ``Scheduler.add_request``.

    Parameters
    ----------
    request_id : int
        Unique among the live requests.
    adapter_id : int
        The adapter's generation; 0 = the base model.
    prompt_token_ids : array-like of int, range int32
        1 to ``max_model_len - 1`` tokens; copied.
    max_tokens : int
        Output tokens, at least 1; prompt and output together at most ``max_model_len``.
    reuse_prefix : bool
        False when every prompt position must be computed (prompt logprobs).

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
    ) -> None: ...
    @property
    def adapter_id(self) -> int: ...
    @property
    def request_id(self) -> int: ...

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
        -1 for the base model, and before the load was planned.
        """
    @property
    def load_failed(self) -> bool: ...
    @property
    def num_hit_tokens(self) -> int: ...
    @property
    def num_host_pages(self) -> int: ...
    @property
    def num_missed_tokens(self) -> int: ...
    @property
    def num_private_pages(self) -> int: ...
    @property
    def num_running_requests(self) -> int: ...
    @property
    def num_tree_pages(self) -> int: ...
    @property
    def num_waiting_requests(self) -> int: ...
    @property
    def state(self) -> AdapterState: ...

class SchedulerStats:
    """
    A snapshot of counts; ``total_*`` count since the scheduler was made.
    """
    @property
    def adapters(self) -> list[AdapterStats]:
        """
        list of AdapterStats, ordered by adapter id; the base model (id 0) is the first.
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
    def num_preempted_requests(self) -> int: ...
    @property
    def num_private_pages(self) -> int: ...
    @property
    def num_running_requests(self) -> int: ...
    @property
    def num_transfers(self) -> int:
        """
        Copies between the tiers that were started and not reported yet.
        """
    @property
    def num_tree_pages(self) -> int: ...
    @property
    def num_waiting_requests(self) -> int: ...
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
    def total_preemptions(self) -> int: ...
    @property
    def total_queried_tokens(self) -> int: ...

class Scheduler:
    """
    Decides what runs next: continuous batching over the KV prefix cache, with adapters.

    Not thread-safe. A step is ``plan = next_plan(now)``, then ``advance(event of that plan)``.

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
    def add_request(self, request: NewRequest) -> None:
        """
        Queue a request.

        Raises
        ------
        InvalidArgumentError
            A field is out of range, or the id is live.
        AdapterNotFoundError
            The generation is not open, is draining, or its load failed.
        """
    def advance(self, event: ExecutionEvent) -> None:
        """
        Take the result of the outstanding plan. The interpreter lock is released meanwhile.

        An event with ``plan_id`` -1 only reports copies; it is taken at any time.

        Raises
        ------
        InvalidArgumentError
            The event does not answer the plan (ids, lengths, loads), or reports a copy that is not under way; nothing
            is changed then.
        """
    def check_invariants(self) -> None:
        """
        Raise InternalError naming what is broken, in the scheduler or its cache; for tests.
        """
    def drain_adapter(self, adapter_id: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Refuse new requests of the generation; once nothing refers to it, one plan lists it as drained.

        Raises
        ------
        AdapterNotFoundError
            The generation is not open, or is the base model. Draining twice changes nothing.
        """
    def next_plan(self, now_us: typing.SupportsInt | typing.SupportsIndex) -> ExecutionPlan:
        """
        Plan one step. The interpreter lock is released meanwhile.

        Parameters
        ----------
        now_us : int
            Microseconds of any clock that never goes back.

        Returns
        -------
        ExecutionPlan
            Owned by the caller; empty when nothing can run, also because all that could waits for copies. An empty
            plan takes no ``advance``.

        Raises
        ------
        InternalError
            An earlier non-empty plan was not advanced, or the clock went back.
        """
    def open_adapter(
        self,
        adapter_id: typing.SupportsInt | typing.SupportsIndex,
        digest_seed: typing.SupportsInt | typing.SupportsIndex,
        size_bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        Open a generation: a namespace of its own, and a load in the next plan.

        Raises
        ------
        InvalidArgumentError
            The id was used before, or is not 1 or higher.
        """
    def stats(self) -> SchedulerStats:
        """
        A snapshot of the counts.
        """
    @property
    def has_work(self) -> bool:
        """
        Whether a request waits or runs, a load or drain is due, or a plan is outstanding. If the plan is empty all the same, everything waits for copies to be reported.
        """
    @property
    def options(self) -> SchedulerOptions: ...
