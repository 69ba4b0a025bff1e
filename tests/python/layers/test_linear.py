"""Packed linear layers: the base product, checkpoint parts, LoRA targets and the LoRA seam."""

from __future__ import annotations

import pytest
import torch

from lora_serve.kernels import LoRASliceWeights
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.layers import LoRAKind, PackedLinear, ops
from support.paged_sequences import PagedSequences

IN_FEATURES = 24
SLICES = {"q_proj": 40, "k_proj": 8, "v_proj": 16}


def make_linear(bias: bool = True) -> PackedLinear:
    linear = PackedLinear(
        "model.layers.3.self_attn",
        SLICES,
        IN_FEATURES,
        bias=bias,
        dtype=torch.float32,
        device=torch.device("cpu"),
        fused_name="qkv_proj",
    )
    generator = torch.Generator().manual_seed(0)
    for _, part in linear.checkpoint_tensors():
        part.copy_(torch.randn(part.shape, generator=generator))
    return linear


def make_module(rank: int, width: int, scaling: float, seed: int) -> LoRASliceWeights:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, IN_FEATURES, generator=generator)
    return LoRASliceWeights(a, torch.randn(rank, width, generator=generator), scaling)


def base_product(linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    y = x.double() @ linear.weight.double().T
    return y if linear.bias is None else y + linear.bias.double()


def delta(x: torch.Tensor, module: LoRASliceWeights) -> torch.Tensor:
    return module.scaling * (x.double() @ module.a.double().T) @ module.b.double()


@pytest.mark.parametrize("bias", [True, False])
def test_two_adapters_and_base_rows_in_one_step_equal_the_products_by_hand(bias: bool) -> None:
    linear = make_linear(bias)
    first = (make_module(5, 40, 0.5, 1), None, make_module(3, 16, -2.0, 2))
    second = (None, make_module(8, 8, 1.25, 3), make_module(1, 16, 0.1, 4))
    install_weights({linear.lora_table: {2: first, 7: second}})
    chunks = [("a", 1), ("b", 3), ("c", 1), ("d", 2), ("e", 1)]
    slots = [7, 2, -1, 7, 2]
    context = PagedSequences(4).step(chunks, slots)
    x = torch.randn(8, IN_FEATURES, generator=torch.Generator().manual_seed(9))

    y = linear.forward(x, context)

    expected = base_product(linear, x)
    for rows, weights in (([1, 2, 3, 7], first), ([0, 5, 6], second)):
        start = 0
        for width, module in zip(SLICES.values(), weights, strict=True):
            if module is not None:
                expected[rows, start : start + width] += delta(x[rows], module)
            start += width
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=0)
    assert torch.equal(y[4], torch.nn.functional.linear(x, linear.weight, linear.bias)[4])


@pytest.mark.parametrize("slots", [[2, -1, 2, -1], [-1, -1, -1, -1]])
def test_the_product_and_deltas_are_added_to_the_residual_stream(
    slots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = make_linear(bias=False)
    install_weights({linear.lora_table: {2: (make_module(5, 40, 0.5, 1), None, make_module(3, 16, -2.0, 2))}})
    context = PagedSequences(4).step([(name, 1) for name in "abcd"], slots)
    x = torch.randn(4, IN_FEATURES, generator=torch.Generator().manual_seed(9))
    before = torch.randn(4, sum(SLICES.values()), generator=torch.Generator().manual_seed(8))
    output, residual = linear.forward(x, context), before.clone()
    monkeypatch.setattr(ops, "MANY_TOKENS", 3)
    monkeypatch.setattr(ops, "_ops_of", lambda _: "as on CUDA")

    assert linear.forward_into(residual, x, context) is None

    torch.testing.assert_close(residual, before + output, atol=1e-5, rtol=0)
    base_rows = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(residual[base_rows], before.addmm(x, linear.weight.t())[base_rows])


@pytest.mark.parametrize(
    ("bias", "many_tokens", "is_cuda"), [(True, 3, True), (False, 4, True), (False, 3, False)]
)
def test_the_residual_stream_is_left_to_the_next_norm_where_the_product_cannot_add_to_it(
    bias: bool, many_tokens: int, is_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, context = make_linear(bias), PagedSequences(4).step([("a", 4)])
    x = torch.randn(4, IN_FEATURES, generator=torch.Generator().manual_seed(9))
    residual, output = torch.full((4, sum(SLICES.values())), torch.nan), linear.forward(x, context)
    monkeypatch.setattr(ops, "MANY_TOKENS", many_tokens)
    if is_cuda:
        monkeypatch.setattr(ops, "_ops_of", lambda _: ops._TORCH_OPS._replace())

    added = linear.forward_into(residual, x, context)

    assert added is not None
    assert torch.equal(added, output)
    assert residual.isnan().all()


def test_a_step_without_adapters_is_the_base_product_alone() -> None:
    linear = make_linear()
    install_weights({linear.lora_table: {0: (make_module(4, 40, 1.0, 1), None, None)}})
    x = torch.randn(3, IN_FEATURES, generator=torch.Generator().manual_seed(9))
    expected = torch.nn.functional.linear(x, linear.weight, linear.bias)

    for slots in (None, [-1]):
        context = PagedSequences(4).step([("a", 3)], slots)
        assert torch.equal(linear.forward(x, context), expected)


def test_a_token_of_an_empty_adapter_slot_is_refused() -> None:
    context = PagedSequences(4).step([("a", 2)], [1])
    with pytest.raises(LookupError, match="slot 1"):
        make_linear().forward(torch.zeros(2, IN_FEATURES), context)


def test_checkpoint_parts_are_disjoint_and_cover_the_fused_parameters() -> None:
    linear = make_linear()
    parts = dict(linear.checkpoint_tensors())

    assert list(parts) == [
        f"model.layers.3.self_attn.{name}.{kind}" for name in SLICES for kind in ("weight", "bias")
    ]
    for value, part in enumerate(parts.values()):
        part.fill_(value)
    rows = torch.repeat_interleave(torch.tensor([0.0, 2.0, 4.0]), torch.tensor(list(SLICES.values())))
    assert torch.equal(linear.weight, rows[:, None].expand(-1, IN_FEATURES))
    assert torch.equal(linear.bias, rows + 1)


def test_lora_targets_name_every_slice_with_its_shape() -> None:
    linear = make_linear()

    targets = dict(linear.lora_targets())

    assert list(targets) == [f"model.layers.3.self_attn.{name}" for name in SLICES]
    for index, (target, width) in enumerate(zip(targets.values(), SLICES.values(), strict=True)):
        assert target.table is linear.lora_table
        assert target.kind is LoRAKind.LINEAR
        assert (target.slice_index, target.in_features, target.out_features) == (index, IN_FEATURES, width)
    assert linear.lora_table.output_slices == tuple(SLICES.values())


def test_fused_lora_targets_name_the_members_in_the_order_of_the_columns() -> None:
    prefix = "model.layers.3.self_attn"
    assert dict(make_linear().fused_lora_targets()) == {
        f"{prefix}.qkv_proj": (f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj")
    }
    alone = PackedLinear(
        prefix, {"o_proj": 4}, 4, bias=False, dtype=torch.float32, device=torch.device("cpu")
    )
    assert list(alone.fused_lora_targets()) == []
