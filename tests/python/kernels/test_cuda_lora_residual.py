"""The adapters' delta of a layer beside its base product: into the residual stream, or into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, signed
from kernels.lora_cases import (
    LAST_SLOT,
    MAX_LORAS,
    LoRACase,
    assert_within_bounds,
    has_same_bits,
    make_case,
)
from kernels.lora_grid_cases import GridCase, expand_oracle, shrink_oracle
from kernels.triton_lora_cases import tables_on_device
from lora_serve.kernels import (
    LoRAMetadata,
    _triton,
    build_lora_metadata,
    cuda_linear,
    cuda_lora,
    triton_lora_linear,
)
from lora_serve.kernels.lora_delta import FEW_TOKENS, MOST_TOKENS_BESIDE, LoRADelta
from lora_serve.kernels.reference import ReferenceResult
from lora_serve.kernels.reference_linear import skinny_linear_reference

NUM_TOKENS = [1, FEW_TOKENS, FEW_TOKENS + 1, 70]


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_product_and_residual_stream_together_have_the_deltas(monkeypatch, device, dtype, num_tokens):
    if device == "cpu":  # torch without CUDA cannot be asked.
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    case, weight = make_step(num_tokens, dtype)
    x, weight, before = (tensor.to(device) for tensor in (case.x, weight, case.y))
    product, residual = torch.nn.functional.linear(x, weight), before.clone()

    y = linear_into(case, residual, x, weight)

    is_base = case.mapping < 0
    assert has_same_bits(residual.cpu()[is_base], before.cpu()[is_base])
    in_stream = num_tokens > FEW_TOKENS
    if in_stream:
        assert has_same_bits(y, product)
        start, expected = before, with_deltas(case, before)
        assert_within_bounds(residual.cpu(), expected)
    else:
        assert has_same_bits(residual, before)
        start, exact_product = product, skinny_linear_reference(case.x, weight.cpu())
        expected = with_deltas(case, product)
        # It is not the library's product that the deltas are added to: each of the two has its roundings.
        expected = ReferenceResult(expected.value, expected.bound + 2 * exact_product.bound)
        assert_within_bounds(y.cpu(), expected)
    deltas = (expected.value - start.cpu().double())[~is_base]
    assert deltas.abs().mean() > 20 * expected.bound[~is_base].mean()


@pytest.mark.parametrize("is_early", [True, False])
def test_in_a_graph_the_adapters_start_first_and_the_product_runs_beside_them(monkeypatch, is_early):
    """The order of launches and of the streams' waits, without a GPU."""
    events: list[str] = []
    stand_in_for_streams(monkeypatch, events)
    monkeypatch.setattr(cuda_lora, "launches_early", lambda x, most_rows: is_early)
    for module, name in (
        (triton_lora_linear, "triton_lora_shrink"),
        (triton_lora_linear, "triton_lora_expand"),
        (cuda_lora, "cuda_linear"),
    ):
        note_calls(monkeypatch, events, module, name)
    case, weight = make_step(FEW_TOKENS + 1, torch.float32)

    bias = signed("cpu", torch.float32, 48, seed=4)

    y = linear_into(case, case.y.clone(), case.x, weight, bias)

    torch.testing.assert_close(y, torch.nn.functional.linear(case.x, weight, bias))
    adapters, product = ("main", "aside") if is_early else ("aside", "main")
    assert events == [
        "aside waits for main",
        f"triton_lora_shrink on {adapters}",
        f"triton_lora_expand on {adapters}",
        f"cuda_linear on {product}",
        "main waits for aside",
    ]


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
def test_delta_is_expanded_beside_the_product(monkeypatch, device, dtype):
    left = note_multiprocessors_left(monkeypatch, device)
    case, weight = make_step(70, dtype)
    x, weight = case.x.to(device), weight.to(device)

    y, delta = linear(case, x, weight)

    assert left == [0]
    assert has_same_bits(y, torch.nn.functional.linear(x, weight))
    has_adapter = case.mapping >= 0
    deltas = with_deltas(case, torch.zeros_like(case.y))
    assert delta.expanded is not None
    assert delta.expanded.dtype == torch.float32
    bound = ReferenceResult(deltas.value[has_adapter], deltas.bound[has_adapter])
    assert_within_bounds(delta.expanded.cpu()[has_adapter], bound)
    assert bound.value.abs().mean() > 20 * bound.bound.mean()


@pytest.mark.parametrize(("most_features", "num_tokens"), [(47, 70), (48, MOST_TOKENS_BESIDE + 1)])
def test_wide_layers_and_many_tokens_leave_the_expand_to_the_next_kernel(
    monkeypatch, most_features, num_tokens
):
    note_multiprocessors_left(monkeypatch, "cpu")
    monkeypatch.setattr(cuda_lora, "_MOST_EXPANDED_FEATURES", most_features)
    if num_tokens > MOST_TOKENS_BESIDE:
        monkeypatch.setattr(cuda_lora, "_fits_beside", lambda x: len(x) <= MOST_TOKENS_BESIDE)
    case, weight = make_step(num_tokens, torch.float32)
    assert linear(case, case.x, weight)[1].expanded is None
    monkeypatch.setattr(cuda_lora, "_MOST_EXPANDED_FEATURES", 48)
    case, weight = make_step(70, torch.float32)
    assert linear(case, case.x, weight)[1].expanded is not None


@pytest.mark.parametrize(
    ("num_tokens", "large_rank", "expected"),
    [(129, 20, 100 // 8), (129, 19, 100 // 6), (128, 19, 100 // 8)],
)
def test_product_beside_the_expand_into_the_stream_leaves_it_room(
    monkeypatch, num_tokens, large_rank, expected
):
    left = note_multiprocessors_left(monkeypatch, "cpu")
    monkeypatch.setattr(cuda_lora, "_LARGE_RANK", large_rank)
    case, weight = make_step(num_tokens, torch.float32)
    linear_into(case, case.y.clone(), case.x, weight)
    monkeypatch.setattr(cuda_lora, "_fits_beside", lambda x: False)
    linear_into(case, case.y.clone(), case.x, weight)
    assert left == [expected, 0]


def test_adapters_run_beside_products_of_so_many_rows_of_16_bits_from_hopper_on(monkeypatch):
    monkeypatch.setattr(cuda_lora, "can_launch_early", lambda x: True)
    counts = (FEW_TOKENS, FEW_TOKENS + 1, MOST_TOKENS_BESIDE, MOST_TOKENS_BESIDE + 1)
    fits = [cuda_lora._fits_beside(torch.empty(count, 8, dtype=torch.float16)) for count in counts]
    assert fits == [False, True, True, False]
    assert not cuda_lora._fits_beside(torch.empty(70, 8))
    monkeypatch.setattr(cuda_lora, "can_launch_early", _triton.can_launch_early)
    assert not cuda_lora._fits_beside(torch.empty(70, 8, dtype=torch.float16))
    assert MOST_TOKENS_BESIDE in triton_lora_linear.warm_up_token_counts(2048)


def test_library_is_told_what_to_leave_for_one_product_alone(monkeypatch):
    told: list[object] = []

    def prefer(library: object = None) -> object:
        told.extend([] if library is None else [library])
        return "as before"

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", prefer)
    monkeypatch.setattr(torch._C, "_set_sm_carveout_experimental", told.append)
    monkeypatch.setattr(cuda_linear, "tuned_launch", lambda *_: None)
    x, weight = torch.ones(2, 3), torch.ones(4, 3)

    assert cuda_linear.cuda_linear(x, weight, None, None, 5).tolist() == [[3.0] * 4] * 2
    assert told == ["cublaslt", 5, None, "as before"]
    with pytest.raises(RuntimeError):
        cuda_linear.cuda_linear(x, weight.t(), None, None, 6)
    assert told[4:] == ["cublaslt", 6, None, "as before"]
    cuda_linear.cuda_linear(x, weight)
    assert len(told) == 8


def note_multiprocessors_left(monkeypatch: pytest.MonkeyPatch, device: str) -> list[int]:
    """As if the device were a Hopper of 100 multiprocessors; what products are told to leave."""
    left: list[int] = []
    if device == "cpu":  # torch without CUDA cannot be asked.
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda_lora, "_num_multiprocessors", lambda device: 100)
    monkeypatch.setattr(cuda_lora, "_fits_beside", lambda x: True)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, multiprocessors_left: int) -> Tensor:
        left.append(multiprocessors_left)
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(cuda_lora, "cuda_linear_beside_shrink", product)
    return left


class StandInStream:
    """Notes in `events` whom it waits for."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self._events = name, events

    def wait_stream(self, other: StandInStream) -> None:
        self._events.append(f"{self.name} waits for {other.name}")


_current = "main"


def stand_in_for_streams(monkeypatch: pytest.MonkeyPatch, events: list[str]) -> None:
    """As if a graph were being captured."""
    main, aside = StandInStream("main", events), StandInStream("aside", events)

    @contextmanager
    def on(stream: StandInStream) -> Iterator[None]:
        global _current
        _current = stream.name
        yield
        _current = "main"

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(cuda_lora, "_aside", lambda device, priority: aside)


def note_calls(monkeypatch: pytest.MonkeyPatch, events: list[str], module: ModuleType, name: str) -> None:
    function = getattr(module, name)

    def noted(*arguments: Any, **options: Any) -> Any:
        events.append(f"{name} on {_current}")
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, noted)


def make_step(num_tokens: int, dtype: torch.dtype) -> tuple[LoRACase, Tensor]:
    """Two adapters of unequal rank, one without a module, and tokens of the base model."""
    slots = [LAST_SLOT, 0, -1, 0, LAST_SLOT, 1]
    ranks: dict[int, tuple[int | None, ...]] = {0: (5,), 1: (None,), LAST_SLOT: (20,)}
    mapping = [slots[token % len(slots)] for token in range(num_tokens)]
    case = make_case(mapping, ranks, output_slices=(48,), in_features=64, dtype=dtype)
    return case, signed("cpu", dtype, 48, 64, seed=3, scale=1 / 8)


def with_deltas(case: LoRACase, y: Tensor) -> ReferenceResult:
    """y with the adapters' deltas, v rounded between the halves."""
    step = GridCase(case.x, y.cpu(), case.table, case.mapping, case.metadata, case.max_rank, offset_start=0)
    v = shrink_oracle(step, y.dtype)
    return expand_oracle(step, v.value, v.bound)


def linear_into(
    case: LoRACase, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`cuda_lora.linear_into` with the case's adapters, on the device of x."""
    table, metadata = on_device(case, x.device)
    return cuda_lora.linear_into(residual, x, weight, bias, table, metadata)


def linear(case: LoRACase, x: Tensor, weight: Tensor) -> tuple[Tensor, LoRADelta]:
    """`cuda_lora.linear` with the case's adapters, on the device of x."""
    table, metadata = on_device(case, x.device)
    return cuda_lora.linear(x, weight, None, table, metadata)


def on_device(case: LoRACase, device: torch.device) -> tuple[Any, LoRAMetadata]:
    """The case's table, and the grouping of its tokens."""
    arena, tables = tables_on_device(case.table, device.type)
    tables.max_rank = case.max_rank
    views = tables.layers[0]
    table = SimpleNamespace(
        **{name: getattr(views, name) for name in ("a_offset", "b_offset", "lora_rank", "scaling")},
        arena=arena,
        tables=tables,
        num_slices=1,
        output_slices=(48,),
    )
    return table, build_lora_metadata(case.mapping, MAX_LORAS, device=device)
