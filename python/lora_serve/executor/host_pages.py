"""The memory of the host tier of the KV pages."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.common.host_slab import HostSlab


class HostPages:
    """Host memory for KV pages; what is in them is the business of `PageTransfers`.

    Parameters
    ----------
    num_pages : int
        >= 0.
    pool : Tensor
        [P, num_layers, 2, G, kv_heads, D]: the device's pages; see `allocate_kv_pool`. If they are on a CUDA
        device, the memory is page-locked, so that copies run beside the steps.

    Raises
    ------
    InvalidArgumentError
        The machine does not give that much memory.
    """

    block: Tensor
    """[num_pages, num_layers, 2, G, kv_heads, D] of the pool's dtype on the CPU, contiguous. Zeroed, so that
    the memory is really there before the first request."""

    def __init__(self, num_pages: int, pool: Tensor) -> None:
        num_bytes = num_pages * pool[0].nbytes
        self._slab = HostSlab(
            num_bytes, is_pinned=pool.is_cuda, contents="KV pages", option="--kv-host-memory-gb"
        )
        if not pool.is_cuda:
            self._slab.tensor.zero_()
        self.block = self._slab.tensor.view(pool.dtype).view(num_pages, *pool.shape[1:])

    @property
    def num_pages(self) -> int:
        """Page ids are in [0, num_pages)."""
        return len(self.block)

    @property
    def is_page_locked(self) -> bool:
        """Whether CUDA copies from and to it without the calling thread's help."""
        return self._slab.is_page_locked

    def close(self) -> None:
        """Drop the memory. No copy may be running; nothing can be copied afterwards."""
        self.block = torch.empty(0, *self.block.shape[1:], dtype=self.block.dtype)
        self._slab.close()
