"""The host tier of the KV pages: its memory, and copies of whole pages between it and the device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_serve.layers.attention import KVLayer


class HostPages:
    """Host copies of KV pages.

    Pages are copied whole, by their ids: no token's position is needed, and what stands behind the last token
    of a page comes along as it is.

    Parameters
    ----------
    block : Tensor
        [H, num_layers, 2, G, kv_heads, D] on the CPU: H pages, keys before values; see
        `allocate_host_block`.
    kv_layers : sequence of KVLayer
        [num_layers]; the device's pages, of the same dtype and page shape.
    """

    def __init__(self, block: Tensor, kv_layers: Sequence[KVLayer]) -> None:
        # For each KV tensor of the device [P, G, kv_heads, D], the view of the block [H, G, kv_heads, D].
        self._pairs = [
            (device, block[:, layer, index])
            for layer, kv_layer in enumerate(kv_layers)
            for index, device in enumerate((kv_layer.k, kv_layer.v))
        ]
        self.num_pages = len(block)

    def write_back(self, device_pages: Tensor, host_pages: Tensor) -> None:
        """Copy device pages to the host.

        Parameters
        ----------
        device_pages, host_pages : Tensor
            [N] int64 on the CPU: page ids of each tier, source and destination of each copy; destinations all
            different.
        """
        for device, host in self._pairs:
            source = device.index_select(0, device_pages.to(device.device))
            host.index_copy_(0, host_pages, source.to(host.device))

    def load_back(self, host_pages: Tensor, device_pages: Tensor) -> None:
        """Copy host pages to the device; parameters as of `write_back`."""
        for device, host in self._pairs:
            source = host.index_select(0, host_pages)
            device.index_copy_(0, device_pages.to(device.device), source.to(device.device))

    def close(self) -> None:
        """Drop the memory; nothing can be copied afterwards."""
        self._pairs = []
