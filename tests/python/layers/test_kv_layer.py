from __future__ import annotations

import pytest
import torch

from lora_serve.layers import KVLayer

PAGE_SHAPE = (4, 2, 6)  # G, kv_heads, D
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_layer(layout: str, device: str) -> tuple[KVLayer, torch.Tensor]:
    """7 pages full of NaN, and all the memory they are in."""
    if layout == "apart":
        pool = torch.full((2, 7, *PAGE_SHAPE), torch.nan, device=device)
        return KVLayer(*pool), pool
    pool = torch.full((7, 3, 2, *PAGE_SHAPE), torch.nan, device=device)
    return KVLayer(pool[:, 1, 0], pool[:, 1, 1]), pool


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["apart", "page after page"])
@pytest.mark.parametrize("slots", [[27], [0, 27, 3, 4], [13, 12, 19, 20, 1], []])
def test_tokens_are_written_to_their_slots_and_nowhere_else(layout, device, slots):
    layer, pool = make_layer(layout, device)
    both = torch.randn(len(slots), 5, 2, 6, device=device)  # Of which keys and values are strided parts.
    key, value = both[:, 1], both[:, 3]

    layer.write(key, value, torch.tensor(slots, dtype=torch.int64, device=device))

    for pages, written in ((layer.k, key), (layer.v, value)):
        assert torch.equal(pages[[slot // 4 for slot in slots], [slot % 4 for slot in slots]], written)
    assert int((~pool.isnan()).sum()) == 2 * key.numel()


@pytest.mark.parametrize(
    ("key_pages", "value_pages"),
    [
        (torch.zeros(7, 4, 2, 6), torch.zeros(8, 4, 2, 6)),
        (torch.zeros(7, 4, 2, 6), torch.zeros(7, 2, 4, 2, 6)[:, 0]),
        (torch.zeros(7, 4, 2, 12)[..., :6], torch.zeros(7, 4, 2, 12)[..., :6]),
        (torch.zeros(7, 2, 4, 6).transpose(1, 2), torch.zeros(7, 2, 4, 6).transpose(1, 2)),
        (torch.zeros(7, 49)[:, :48].view(7, 4, 2, 6), torch.zeros(7, 49)[:, :48].view(7, 4, 2, 6)),
        (torch.zeros(4, 2, 6).expand(7, 4, 2, 6), torch.zeros(4, 2, 6).expand(7, 4, 2, 6)),
    ],
)
def test_pages_of_another_layout_are_refused(key_pages, value_pages):
    with pytest.raises(ValueError, match="contiguous pages, equally far apart"):
        KVLayer(key_pages, value_pages)
