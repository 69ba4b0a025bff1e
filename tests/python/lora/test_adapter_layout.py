from __future__ import annotations

import random

import pytest
import torch

from lora.adapter_setup import make_targets
from lora.peft_setup import make_full_targets
from lora_serve.lora.adapter_layout import (
    BLOCK_ALIGNMENT,
    MATRIX_ALIGNMENT,
    AdapterLayout,
    ModuleLayout,
    ModuleSize,
    align,
    lay_out,
    view_modules,
)


def test_matrices_follow_each_other_by_module_path_each_aligned():
    layout = lay_out(
        [
            ModuleSize("model.layers.1.mlp.up_proj", 3, 0.5, num_a_bytes=30, num_b_bytes=17),
            ModuleSize("model.layers.0.mlp.up_proj", 5, 2.0, num_a_bytes=16, num_b_bytes=1),
        ]
    )
    assert layout == AdapterLayout(
        modules=(
            ModuleLayout("model.layers.0.mlp.up_proj", 5, 2.0, a_offset=0, b_offset=16),
            ModuleLayout("model.layers.1.mlp.up_proj", 3, 0.5, a_offset=32, b_offset=64),
        ),
        num_bytes=256,
    )
    assert layout.lora_rank == 5
    assert layout.target_modules == ("up_proj",)


def test_modules_trained_as_one_share_their_a():
    layout = lay_out(
        [
            ModuleSize("m.q_proj", 4, 1.0, 100, 300, shared_a="m.qkv_proj"),
            ModuleSize("m.k_proj", 4, 1.0, 100, 200, shared_a="m.qkv_proj"),
            ModuleSize("m.o_proj", 4, 1.0, 50, 60),
            ModuleSize("m.v_proj", 4, 1.0, 100, 200, shared_a="m.qkv_proj"),
        ]
    )
    offsets = {module.module: (module.a_offset, module.b_offset) for module in layout.modules}
    assert offsets == {
        "m.k_proj": (0, 112),
        "m.o_proj": (320, 384),
        "m.q_proj": (0, 448),
        "m.v_proj": (0, 752),
    }
    assert layout.num_bytes == 1024
    assert layout.target_modules == ("k_proj", "o_proj", "q_proj", "v_proj")


@pytest.mark.parametrize("seed", range(20))
def test_matrices_never_overlap_and_waste_only_their_alignment(seed):
    rng = random.Random(seed)
    sizes = [
        ModuleSize(f"m{i:03}", rng.randint(1, 64), 1.0, rng.randint(1, 5000), rng.randint(1, 5000))
        for i in range(rng.randint(1, 60))
    ]
    shuffled = rng.sample(sizes, len(sizes))
    layout = lay_out(shuffled)
    assert layout == lay_out(sizes)
    spans = []
    for size, module in zip(sizes, layout.modules, strict=True):
        assert size.module == module.module
        spans += [(module.a_offset, size.num_a_bytes), (module.b_offset, size.num_b_bytes)]
    end = 0
    for offset, num_bytes in spans:
        assert offset % MATRIX_ALIGNMENT == 0
        assert end <= offset < end + MATRIX_ALIGNMENT
        end = offset + num_bytes
    assert layout.num_bytes % BLOCK_ALIGNMENT == 0
    assert end <= layout.num_bytes < end + MATRIX_ALIGNMENT + BLOCK_ALIGNMENT


def test_module_named_twice_is_refused():
    with pytest.raises(ValueError, match="'m' is laid out twice"):
        lay_out([ModuleSize("m", 1, 1.0, 16, 16), ModuleSize("m", 2, 1.0, 16, 16)])


def test_shared_matrix_of_two_sizes_is_refused():
    with pytest.raises(ValueError, match="'n' shares an A of 16 bytes"):
        lay_out(
            [ModuleSize("m", 1, 1.0, 16, 16, shared_a="x"), ModuleSize("n", 1, 1.0, 32, 16, shared_a="x")]
        )


def test_layout_without_modules_is_empty():
    layout = lay_out([])
    assert (layout.num_bytes, layout.lora_rank, layout.target_modules) == (0, 0, ())


@pytest.mark.parametrize(("num_bytes", "expected"), [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_align_rounds_up(num_bytes, expected):
    assert align(num_bytes, 16) == expected


def test_views_have_the_shapes_that_operators_read_and_share_the_blocks_memory():
    layout = lay_out(
        [
            ModuleSize("model.layers.0.self_attn.q_proj", 3, 0.5, 3 * 24 * 2, 3 * 32 * 2),
            ModuleSize("model.embed_tokens", 2, 4.0, 48 * 2 * 2, 2 * 24 * 2),
        ]
    )
    block = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    views = view_modules(layout, block, make_full_targets(), torch.bfloat16)
    assert {module: (v.a.shape, v.b.shape, v.scaling) for module, v in views.items()} == {
        "model.layers.0.self_attn.q_proj": ((3, 24), (3, 32), 0.5),
        "model.embed_tokens": ((48, 2), (2, 24), 4.0),
    }
    views["model.layers.0.self_attn.q_proj"].b[2, 31] = 1.0
    offset = next(m.b_offset for m in layout.modules if m.module.endswith("q_proj"))
    assert block.view(torch.bfloat16)[offset // 2 + 3 * 32 - 1] == 1.0
    assert make_targets().keys() < make_full_targets().keys()
