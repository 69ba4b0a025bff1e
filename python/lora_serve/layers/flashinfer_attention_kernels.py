"""FlashInfer's kernels for paged attention: which one, how much memory, how it is planned and run.

The only importer of `flashinfer`. What is called is its compiled module, one level below its wrapper classes:
those keep one pinned buffer for all plans, copy page indices from the host and read lengths back from the
device. Two kernels are used. Both honour any page stride and compute page offsets in 64 bits.

========  =======================================  ====================================================
 kernel    runs                                     what it reads
========  =======================================  ====================================================
 fa2       decode rows (KV split over programs,     its plan, and on the device `qo_indptr`, `page_indptr`,
           query heads of a KV head in one tile);   `last_page_len`, page indices
           prefill rows where fa3 is not there
 fa3       prefill rows on Hopper                   its plan, page indices
========  =======================================  ====================================================

Source: flashinfer 0.7.2, `flashinfer/prefill.py` (get_batch_prefill_module) and
`include/flashinfer/attention/scheduler.cuh`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.layers.attention import AttentionSpec, KVLayer

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
OTHER_BACKEND = "use --attention-backend torch"

_LAYOUT_NHD = 0
_MASK_NONE, _MASK_CAUSAL = 0, 1
_NO_POSITIONS = 0
_SLACK_BYTES = 1024  # Each of at most 12 arrays begins at a multiple of 16.


def import_flashinfer() -> Any:
    """Import FlashInfer's prefill module.

    Raises
    ------
    InvalidArgumentError
        It is not installed, or lacks what is used here.
    """
    try:
        module = importlib.import_module("flashinfer.prefill")
        return module.get_batch_prefill_module
    except (ImportError, AttributeError) as error:
        raise InvalidArgumentError(
            f"the flashinfer attention backend cannot be loaded ({error}); "
            f"pip install 'lora-serve[cuda]', or {OTHER_BACKEND}"
        ) from error


def check_supported(kv_layer: KVLayer, specs: Sequence[AttentionSpec], capability: tuple[int, int]) -> None:
    """Refuse what FlashInfer's kernels cannot do.

    Parameters
    ----------
    kv_layer
        The pages of any layer.
    specs
        Every distinct spec of the model.
    capability
        Compute capability of the device.

    Raises
    ------
    InvalidArgumentError
        With what is not supported, and what to do.
    """
    keys = kv_layer.k
    problems = [
        f"head size {spec.head_dim} (only {', '.join(map(str, HEAD_DIMS))})"
        for spec in specs
        if spec.head_dim not in HEAD_DIMS
    ]
    problems += [
        f"{spec.num_heads} query heads over {spec.num_kv_heads} KV heads"
        for spec in specs
        if spec.num_heads % spec.num_kv_heads
    ]
    if keys.dtype not in DTYPES:
        problems.append(f"{keys.dtype} (only 16-bit types)")
    if capability < (8, 0):
        problems.append(f"devices of compute capability {capability[0]}.{capability[1]} (8.0 or newer)")
    # fa2 holds the distance of two pages in 32 bits; that of a page to the first one in 64.
    if keys.stride(0) >= 2**32:
        problems.append(f"pages {keys.stride(0)} elements apart")
    if problems:
        raise InvalidArgumentError(f"flashinfer attention does not support {problems[0]}; {OTHER_BACKEND}")


@dataclass(frozen=True)
class KernelShape:
    """What a compiled kernel and a plan depend on, beside the step.

    Two specs with equal shapes share plans.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window_left: int  # Tokens before a token that it sees; -1 = all.

    @staticmethod
    def of(spec: AttentionSpec) -> KernelShape:
        """Take the shape of a spec."""
        window_left = -1 if spec.sliding_window is None else spec.sliding_window - 1
        return KernelShape(spec.num_heads, spec.num_kv_heads, spec.head_dim, window_left)

    @property
    def group_size(self) -> int:
        """Query heads of one KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class StepSize:
    """The rows that one launch covers.

    Parameters
    ----------
    num_rows, num_tokens
        Rows, and their query tokens.
    spare_splits
        Pieces of KV that the rows may be split into beyond what two programs for each multiprocessor give.
        With 0, a batch of many rows is not split at all, and one long row keeps everybody waiting.
    is_fixed
        The launch is captured: its size and its places in memory depend on `num_rows` alone.
    is_split
        The KV of a row may be split over programs, and a second kernel merges their results. With False one
        program does a tile of queries of a KV head (fa2 only): what it works on depends on `num_rows` alone.
    """

    num_rows: int
    num_tokens: int
    spare_splits: int
    is_fixed: bool
    is_split: bool = True


def _max_splits(shape: KernelShape, size: StepSize, num_multiprocessors: int) -> int:
    return 2 * num_multiprocessors // shape.num_kv_heads + size.spare_splits


def fa2_int_bytes(shape: KernelShape, size: StepSize, num_multiprocessors: int) -> int:
    """Bound the bytes of a plan of fa2: what one program works on, and where partial results lie."""
    num_tiles = size.num_tokens * shape.group_size // 16 + size.num_rows
    num_programs = num_tiles + _max_splits(shape, size, num_multiprocessors)
    return _aligned(13 * num_programs + 4 * (size.num_rows + 1) + 4 * (size.num_tokens + 1) + _SLACK_BYTES)


def fa2_float_bytes(shape: KernelShape, size: StepSize, num_multiprocessors: int) -> int:
    """Bound the bytes of fa2's partial results."""
    if not size.is_split:
        return 256
    num_programs = size.num_rows + _max_splits(shape, size, num_multiprocessors)
    is_decode = size.num_tokens == size.num_rows
    tile = 16 if is_decode and shape.group_size <= 16 else 128
    rows = num_programs * tile // shape.group_size + 1
    return _aligned(4 * rows * shape.num_heads * (shape.head_dim + 1) + _SLACK_BYTES)


def fa3_int_bytes(shape: KernelShape, size: StepSize, num_multiprocessors: int) -> int:
    """Bound the bytes of a plan of fa3: seven numbers for each query tile of each head."""
    num_tiles = size.num_tokens // 128 + size.num_rows
    return _aligned(28 * num_tiles * shape.num_heads + 4 * (num_multiprocessors + 1) + _SLACK_BYTES)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 256) * 256


@dataclass(frozen=True, eq=False)
class PlanMemory:
    """Where a plan is written.

    Parameters
    ----------
    pinned, int_workspace
        uint8 of one length: the plan on the host, and on the device. FlashInfer's `plan` submits the copy
        between them to the current stream.
    float_workspace
        uint8 on the device: partial results while the kernel runs.
    """

    pinned: Tensor
    int_workspace: Tensor
    float_workspace: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a step, on the host and on the device: [B + 1], [B + 1], [B], [B] int32.

    Parameters
    ----------
    qo_indptr
        Where a row's query tokens begin, from 0.
    page_indptr
        Where a row's entries in the page indices begin.
    kv_lens
        Tokens of the row's pages, the step's own included; host only.
    last_page_len
        Tokens of the row's last page; device only.
    """

    qo_indptr: Tensor
    page_indptr: Tensor
    kv_lens: Tensor
    last_page_len: Tensor


class PagedKernel:
    """A compiled module: plans launches and runs them.

    Parameters
    ----------
    get_module
        What :func:`import_flashinfer` gave.
    name
        "fa2" or "fa3".
    shape, dtype
        Heads and window; type of queries, keys, values and output.

    Notes
    -----
    The first one of a kind on a machine is compiled, which takes minutes; later processes find it in
    FlashInfer's cache.
    """

    def __init__(self, get_module: Any, name: str, shape: KernelShape, dtype: torch.dtype) -> None:
        self.name = name
        self.shape = shape
        has_window = shape.window_left >= 0
        dim = shape.head_dim
        self._module = get_module(
            name, dtype, dtype, dtype, torch.int32, dim, dim, _NO_POSITIONS, has_window, False, False
        )

    def plan(self, memory: PlanMemory, host: Rows, size: StepSize, page_size: int, *, is_causal: bool) -> Any:
        """Divide the rows among programs, and submit the copy of the result; host time only.

        Returns
        -------
        Any
            The places of the plan's arrays, for :meth:`run`.
        """
        shape = self.shape
        arguments: list[Any] = [
            memory.float_workspace,
            memory.int_workspace,
            memory.pinned,
            host.qo_indptr,
            host.page_indptr,
            host.kv_lens,
            size.num_tokens,
            size.num_rows,
            shape.num_heads,
            shape.num_kv_heads,
            page_size,
            size.is_fixed and size.is_split,  # Unsplit, the size is fixed without padding.
            shape.head_dim,
            shape.head_dim,
            is_causal,
            shape.window_left,
        ]
        if self.name == "fa2":
            # No fixed split, splitting allowed. The number of programs that another kernel takes away is
            # negative here: room for `spare_splits` more. A captured decode row has one token in every step.
            uniform_length = 1 if size.is_fixed and size.is_split else 0
            spare_programs = size.spare_splits * shape.num_kv_heads
            arguments += [-1, not size.is_split, -spare_programs, uniform_length]
        return self._module.plan(*arguments)

    def run(
        self,
        query: Tensor,
        kv_layer: KVLayer,
        output: Tensor,
        *,
        memory: PlanMemory,
        plan_info: Any,
        rows: Rows,
        page_indices: Tensor,
        is_causal: bool,
        scaling: float,
        launches_early: bool,
    ) -> None:
        """Attend: [T, Hq, D] queries of the planned rows into `output` of the same shape."""
        self._module.paged_run(
            memory.float_workspace,
            memory.int_workspace,
            plan_info,
            query,
            kv_layer.k,
            kv_layer.v,
            rows.qo_indptr,
            rows.page_indptr,
            page_indices,
            rows.last_page_len,
            output,
            None,  # no log-sum-exp
            _MASK_CAUSAL if is_causal else _MASK_NONE,
            _LAYOUT_NHD,
            self.shape.window_left,
            launches_early,
            *(None,) * 6,  # masks, slopes, multi-item scoring
            0.0,  # no soft cap
            scaling,
            *(None,) * 3,  # fp8 scales
            1.0,
            1e4,
            0,
            0,
        )


def load_kernels(
    get_module: Any, wanted: Sequence[tuple[str, KernelShape]], dtype: torch.dtype
) -> dict[tuple[str, KernelShape], PagedKernel]:
    """Load kernels, several at once where they must be compiled."""
    names = ", ".join(f"{name} with {shape}" for name, shape in wanted)
    logger.info("loading FlashInfer kernels (compiled once on a machine, which takes minutes): %s", names)
    with ThreadPoolExecutor(max_workers=max(1, len(wanted))) as pool:
        loaded = pool.map(lambda key: PagedKernel(get_module, key[0], key[1], dtype), wanted)
        return dict(zip(wanted, loaded, strict=True))
