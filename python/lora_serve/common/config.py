"""The engine's configuration, checked once and carried unchanged to every part."""

from __future__ import annotations

import msgspec

from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.common.field_checks import check_bool, check_float, check_int, refuse
from lora_serve.common.kv_events_config import KVEventsConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
KV_WRITE_POLICIES = ("write_through", "write_back", "off")
SCHEDULING_POLICIES = ("fair", "fcfs", "lpm")
MAX_MEMORY_GB = 2.0**30
"""An exbibyte: what is above is a slip."""
_PREFILL_GRAPH_SIZES = (64, 128, 192, 256, 384, 512, 768, 1024)
_MAX_INT32 = 2**31 - 1
_MAX_MS = 2**40


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine runs, and with how much memory.

    Parameters
    ----------
    model : str
        A Hugging Face directory or hub id.
    dtype : {'auto', 'float32', 'bfloat16', 'float16'}
        Type of weights and KV; 'auto' = the checkpoint's.
    device : str
        A torch device, such as 'cpu'; 'auto' = CUDA where torch finds a device, else the CPU. The engine's
        process chooses, so that no other one starts CUDA.
    load_format : {'auto', 'dummy'}
        'dummy' fills the weights with random numbers and reads only config.json.
    page_size : int
        Tokens of a KV page, at least 1.
    num_device_pages : int or None
        KV pages on the device; None = as many as `kv_memory_gb` holds.
    kv_memory_gb : float or None
        Memory of the KV pages in GiB, above 0; ignored when `num_device_pages` is given. None = on CUDA what
        `gpu_memory_utilization` leaves, elsewhere 1 GiB.
    gpu_memory_utilization : float
        Part of a CUDA device's memory that may be in use, by weights, adapters, steps, decode graphs, KV
        pages and other processes together, above 0 and at most 1; ignored when one of the two above is given.
    kv_host_memory_gb : float
        Memory of the host tier of KV pages in GiB, taken at the start; 0 = there is no host tier.
    kv_write_policy : {'write_through', 'write_back', 'off'}
        When device pages are copied to the host tier: as soon as they are computed, shortly before they would
        be evicted, or only those of a request that is preempted (which the other two copy, too).
    max_num_seqs : int
        Requests that may run at once.
    max_num_batched_tokens : int
        Tokens of one step, at least `max_num_seqs`.
    max_model_len : int or None
        Longest prompt plus answer in tokens; None = the model's own, or less if the KV pages hold less.
    max_loras : int
        Distinct adapters in one step.
    max_lora_rank : int
        Largest accepted adapter rank.
    lora_memory_gb : float
        Device memory for adapters in GiB, above 0; adapters that do not fit beside the others are brought in
        when requests want them.
    lora_host_memory_gb : float
        Host memory for adapters in GiB, above 0; those that do not fit are read from disk again when requests
        want them. No adapter may be larger.
    max_loading_adapters : int
        Adapters that waiting requests bring to the device at once, at least 1.
    adapter_patience_ms : int
        How long an adapter whose requests wait for room on the device waits before one that is there is
        paused, or closed to newcomers, at least 0.
    adapter_time_slice_steps : int
        Steps after which an adapter on the device may be paused, with its requests, for one that waits, when
        as many wait as are there, at least 0; with the cube of how many wait it gets longer. 0 = never.
    adapter_pause_ms : int
        How long a paused adapter waits before another one is paused for it, at least 0.
    scheduling_policy : {'fair', 'fcfs', 'lpm'}
        Who of the waiting requests of one priority goes first: those of the adapter that has had the fewest
        tokens for its weight, the oldest, or the one with the longest cached prefix.
    priority_ageing_ms : int
        Waiting so long counts as much as one class of priority, at least 1.
    max_queued_requests, max_queued_tokens : int
        Requests that wait for their first step, and their prompt tokens, at most; newcomers beyond are
        refused. 0 = no limit.
    max_requests_per_adapter : int
        Requests of one adapter, or of the base model, that wait or run, at most. 0 = no limit.
    async_scheduling : bool
        A step is planned while the one before runs. Both ways give the same tokens.
    enable_prefix_caching : bool
        Requests may start from KV pages that others of the same namespace have computed.
    kv_events_config : KVEventsConfig or None
        Where changes of the KV cache are published, for routers; None = nowhere.
    lora_allowed_roots : list of str or None
        Folders that local adapters may be read from; None = any.
    lora_allow_hub : bool
        Adapter paths may be repositories of the Hugging Face hub.
    lora_resolvers : list of str
        Plug-ins that bring adapters from elsewhere, in the order in which they are asked.
    seed : int
        Seeds requests without a seed of their own, and dummy weights.
    attention_backend : str
        Name of the attention implementation; 'auto' = 'flashinfer' on CUDA, 'torch' elsewhere.
    enforce_eager : bool
        No step is replayed from a CUDA graph.
    cuda_graph_sizes : list of int or None
        Requests, each between 1 and `max_num_seqs`, for which a decode step has a CUDA graph; a step of fewer
        is padded to the next size. None = 1, 2, 4, then every 8 up to `max_num_seqs`.
    prefill_graph_sizes : list of int or None
        Tokens, each between 1 and `max_num_batched_tokens`, for which a step that prefills is run from CUDA
        graphs, one between each two attentions; a step of fewer is padded to the next size. Empty = none.
        None = those of 64, 128, 192, 256, 384, 512, 768 and 1,024 that a step may have: in larger ones the
        device takes longer than the launches.

    Raises
    ------
    InvalidArgumentError
        A field has a wrong type or value, at construction and when a message is decoded.
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    page_size: int = 16
    num_device_pages: int | None = None
    kv_memory_gb: float | None = None
    gpu_memory_utilization: float = 0.9
    kv_host_memory_gb: float = 0.0
    kv_write_policy: str = "write_through"
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    max_loras: int = 64
    max_lora_rank: int = 64
    lora_memory_gb: float = 1.0
    lora_host_memory_gb: float = 1.0
    max_loading_adapters: int = 4
    adapter_patience_ms: int = 20
    adapter_time_slice_steps: int = 4
    adapter_pause_ms: int = 75
    scheduling_policy: str = "fair"
    priority_ageing_ms: int = 1000
    max_queued_requests: int = 0
    max_queued_tokens: int = 0
    max_requests_per_adapter: int = 0
    async_scheduling: bool = True
    enable_prefix_caching: bool = True
    kv_events_config: KVEventsConfig | None = None
    lora_allowed_roots: list[str] | None = None
    lora_allow_hub: bool = False
    lora_resolvers: list[str] = []
    seed: int = 0
    attention_backend: str = "auto"
    enforce_eager: bool = False
    cuda_graph_sizes: list[int] | None = None
    prefill_graph_sizes: list[int] | None = None

    def __post_init__(self) -> None:
        self.validate()

    @property
    def is_cuda(self) -> bool:
        """Whether the device is CUDA's.

        Raises
        ------
        InternalError
            It is 'auto': nothing has been chosen yet.
        """
        if self.device == "auto":
            raise InternalError("whether the device is CUDA's was asked before 'auto' was chosen")
        return self.device.split(":")[0] == "cuda"

    @property
    def chosen_attention_backend(self) -> str:
        """`attention_backend`, or what 'auto' stands for."""
        if self.attention_backend != "auto":
            return self.attention_backend
        return "flashinfer" if self.is_cuda else "torch"

    @property
    def chosen_cuda_graph_sizes(self) -> tuple[int, ...]:
        """Requests for which a decode step has a CUDA graph, rising; none with `enforce_eager`."""
        if self.enforce_eager:
            return ()
        if self.cuda_graph_sizes is not None:
            return tuple(sorted(set(self.cuda_graph_sizes)))
        sizes = {1, 2, 4, *range(8, self.max_num_seqs, 8), self.max_num_seqs}
        return tuple(sorted(size for size in sizes if size <= self.max_num_seqs))

    @property
    def chosen_prefill_graph_sizes(self) -> tuple[int, ...]:
        """Tokens for which a step that prefills has CUDA graphs, rising; none with `enforce_eager`."""
        if self.enforce_eager:
            return ()
        if self.prefill_graph_sizes is not None:
            return tuple(sorted(set(self.prefill_graph_sizes)))
        return tuple(size for size in _PREFILL_GRAPH_SIZES if size <= self.max_num_batched_tokens)

    def validate(self) -> None:
        """Check every field.

        Raises
        ------
        InvalidArgumentError
            Names the field, what was found and what was expected.
        """
        for field in ("model", "device", "attention_backend"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                refuse(field, getattr(self, field), "a non-empty string")
        if self.dtype not in DTYPES:
            refuse("dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if self.load_format not in LOAD_FORMATS:
            refuse("load_format", self.load_format, f"one of {', '.join(LOAD_FORMATS)}")
        check_int("page_size", self.page_size, 1)
        if self.num_device_pages is not None:
            check_int("num_device_pages", self.num_device_pages, 1)
        if self.kv_memory_gb is not None:
            check_float("kv_memory_gb", self.kv_memory_gb, 0.0, above_minimum=True)
        check_float("kv_host_memory_gb", self.kv_host_memory_gb, 0.0)
        if self.kv_write_policy not in KV_WRITE_POLICIES:
            refuse("kv_write_policy", self.kv_write_policy, f"one of {', '.join(KV_WRITE_POLICIES)}")
        if self.max_model_len is not None:
            check_int("max_model_len", self.max_model_len, 2)
        for field in ("max_num_seqs", "max_num_batched_tokens", "max_loras", "max_lora_rank"):
            check_int(field, getattr(self, field), 1)
        if self.max_num_batched_tokens < self.max_num_seqs:
            refuse(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"at least max_num_seqs, which is {self.max_num_seqs}; raise it or lower --max-num-seqs",
            )
        self._validate_scheduling()
        check_bool("enable_prefix_caching", self.enable_prefix_caching)
        self._validate_kv_events()
        check_int("seed", self.seed, 0, 2**63 - 1)
        self._validate_adapter_memory()
        self._validate_cuda()

    def _validate_cuda(self) -> None:
        check_float("gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0, above_minimum=True)
        check_bool("enforce_eager", self.enforce_eager)
        if self.cuda_graph_sizes == []:
            refuse("cuda_graph_sizes", [], "one or more, or None for the usual ones (none: --enforce-eager)")
        self._validate_graph_sizes("cuda_graph_sizes", self.max_num_seqs)
        self._validate_graph_sizes("prefill_graph_sizes", self.max_num_batched_tokens)

    def _validate_graph_sizes(self, field: str, largest: int) -> None:
        sizes = getattr(self, field)
        if sizes is None:
            return
        if not isinstance(sizes, list):
            refuse(field, sizes, "a list of sizes, or None for the usual ones")
        for size in sizes:
            check_int(field, size, 1, largest)

    def _validate_kv_events(self) -> None:
        if self.kv_events_config is None:
            return
        if not isinstance(self.kv_events_config, KVEventsConfig):
            refuse("kv_events_config", self.kv_events_config, "a KVEventsConfig or None")
        if self.kv_events_config.is_on and not self.enable_prefix_caching:
            raise InvalidArgumentError(
                "kv_events_config publishes events but prefix caching is off: routers would count on pages "
                "that no request may use; remove --no-prefix-caching or --kv-events-config"
            )

    def _validate_scheduling(self) -> None:
        check_int("max_loading_adapters", self.max_loading_adapters, 1, _MAX_INT32)
        check_int("adapter_patience_ms", self.adapter_patience_ms, 0, _MAX_MS)
        check_int("adapter_time_slice_steps", self.adapter_time_slice_steps, 0, _MAX_INT32)
        check_int("adapter_pause_ms", self.adapter_pause_ms, 0, _MAX_MS)
        if self.scheduling_policy not in SCHEDULING_POLICIES:
            refuse("scheduling_policy", self.scheduling_policy, f"one of {', '.join(SCHEDULING_POLICIES)}")
        check_int("priority_ageing_ms", self.priority_ageing_ms, 1, _MAX_MS)
        check_int("max_queued_requests", self.max_queued_requests, 0, _MAX_INT32)
        check_int("max_queued_tokens", self.max_queued_tokens, 0, 2**63 - 1)
        check_int("max_requests_per_adapter", self.max_requests_per_adapter, 0, _MAX_INT32)
        check_bool("async_scheduling", self.async_scheduling)

    def _validate_adapter_memory(self) -> None:
        for field in ("lora_memory_gb", "lora_host_memory_gb"):
            check_float(field, getattr(self, field), 2**-30, MAX_MEMORY_GB)
        if self.lora_allowed_roots is not None and not _is_list_of_names(self.lora_allowed_roots):
            refuse("lora_allowed_roots", self.lora_allowed_roots, "a list of folders, or None for any folder")
        check_bool("lora_allow_hub", self.lora_allow_hub)
        if not _is_list_of_names(self.lora_resolvers):
            refuse("lora_resolvers", self.lora_resolvers, "a list of names of plug-ins")


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)
