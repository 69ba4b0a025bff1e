"""The linear layer of few rows against exact arithmetic, and the table of its launch parameters."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES, DEVICES, signed
from kernels.lora_cases import assert_within_bounds, has_same_bits
from lora_serve.kernels import skinny_linear as module
from lora_serve.kernels import tuned_tables
from lora_serve.kernels.reference_linear import skinny_linear_reference
from lora_serve.kernels.skinny_linear import MAX_ROWS, SkinnyLaunch, skinny_linear, tuned_launch

FMA = SkinnyLaunch("fma", block_n=4, block_k=64, num_warps=1)
LAUNCHES = {
    "fma": FMA,
    "fma_tiles": SkinnyLaunch("fma", block_n=2, block_k=128, num_warps=2, num_stages=3, tiles=5),
    "fma_prefetched": SkinnyLaunch("fma", block_n=8, block_k=64, num_warps=1, is_prefetched=True),
    "dot": SkinnyLaunch("dot", block_n=16, block_k=32, num_warps=1, num_stages=3),
    "dot_wide": SkinnyLaunch("dot", block_n=64, block_k=64, num_warps=4, num_stages=3),
    "dot_split": SkinnyLaunch("dot", block_n=16, block_k=32, num_warps=4, num_stages=2, splits=4),
    "dot_prefetched": SkinnyLaunch("dot", 32, 32, num_warps=2, num_stages=2, splits=2, is_prefetched=True),
}


@pytest.mark.parametrize(("device", "dtype"), DEVICE_DTYPES)
@pytest.mark.parametrize("launch", list(LAUNCHES.values()), ids=list(LAUNCHES))
@pytest.mark.parametrize(
    ("num_rows", "out_features", "in_features"),
    [(1, 64, 256), (3, 37, 192), (8, 65, 100), (17, 1, 33), (1, 51, 16)],
)
def test_every_output_is_exact_to_rounding(device, dtype, launch, num_rows, out_features, in_features):
    x = signed(device, dtype, num_rows, in_features, seed=1)
    weight = signed(device, dtype, out_features, in_features, seed=2)
    bias = signed(device, dtype, out_features, seed=3) if num_rows != 3 else None
    out = torch.full((num_rows, out_features), float("nan"), dtype=dtype, device=device)

    assert skinny_linear(x, weight, bias, out, launch=launch) is out

    assert_within_bounds(out, skinny_linear_reference(x, weight, bias))
    assert has_same_bits(out, skinny_linear(x, weight, bias, launch=launch))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_rows", [1, 2, MAX_ROWS])
def test_default_parameters_serve_any_number_of_rows(device, num_rows):
    x = signed(device, torch.float16, num_rows, 320, seed=1)
    weight = signed(device, torch.float16, 70, 320, seed=2)
    assert_within_bounds(skinny_linear(x, weight), skinny_linear_reference(x, weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("launch", [LAUNCHES[name] for name in ("fma", "fma_prefetched", "dot", "dot_split")])
def test_rows_at_a_distance_leave_what_lies_between_alone(device, launch):
    wide = [signed(device, torch.float16, rows, 200, seed=rows) for rows in (5, 40)]
    x, weight = (tensor[:, 16:116] for tensor in wide)
    for tensor in wide:
        tensor[:, :16] = tensor[:, 116:] = float("nan")
    out = torch.full((5, 60), float("nan"), dtype=torch.float16, device=device)

    skinny_linear(x, weight, out=out[:, 7:47], launch=launch)

    assert has_same_bits(out[:, 7:47], skinny_linear(x.contiguous(), weight.contiguous(), launch=launch))
    assert out[:, 7:47].isfinite().all()
    assert out[:, :7].isnan().all()
    assert out[:, 47:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("launch", [LAUNCHES["dot"], LAUNCHES["dot_split"]])
def test_not_a_number_stays_in_its_row(device, launch):
    x = signed(device, torch.float16, 6, 64)
    x[5, 3] = float("nan")
    y = skinny_linear(x, signed(device, torch.float16, 20, 64, seed=4), launch=launch)
    assert y.isnan().any(dim=1).tolist() == [False] * 5 + [True]


@pytest.mark.gpu
@pytest.mark.parametrize("launch", list(LAUNCHES.values()), ids=list(LAUNCHES))
def test_early_launch_waits_for_what_the_kernel_before_writes(launch):
    x = signed("cuda", torch.bfloat16, 4, 4096, seed=1)
    weights = [signed("cuda", torch.bfloat16, 4096, 4096, seed=i, scale=1 / 64) for i in range(2, 6)]

    def chain(launches_early: bool) -> torch.Tensor:
        y = x
        for weight in weights:
            y = skinny_linear(y, weight, launch=launch, launches_early=launches_early)
        return y

    expected = chain(False)
    with torch.cuda.stream(torch.cuda.Stream()):
        chain(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(True)
    for _ in range(50):
        y.fill_(float("nan"))
        graph.replay()
        assert has_same_bits(y, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_step_without_rows_gives_none(device):
    assert skinny_linear(torch.empty(0, 8, device=device), torch.ones(3, 8, device=device)).shape == (0, 3)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [((2, 5), (3, 4), None), ((2, 4), (3, 4), (4,)), ((MAX_ROWS + 1, 4), (3, 4), None)],
)
def test_unfit_shapes_are_refused_by_name(x, weight, bias):
    with pytest.raises(ValueError, match=rf"\({x[0]}, {x[1]}\)"):
        skinny_linear(torch.ones(x), torch.ones(weight), None if bias is None else torch.ones(bias))


class _FakeWeight:
    """What the table asks of a weight on a GPU."""

    is_cuda = True
    device = "cuda"
    dtype = torch.bfloat16

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def is_contiguous(self) -> bool:
        return True


@pytest.fixture
def table(tmp_path, monkeypatch):
    rows = [
        {"out_features": 6, "in_features": 4, "dtype": "bfloat16", "max_rows": 8, "launch": None},
        {
            "out_features": 6,
            "in_features": 4,
            "dtype": "bfloat16",
            "max_rows": 1,
            "launch": {"kind": "fma", "block_n": 4, "block_k": 64, "num_warps": 1},
        },
    ]
    (tmp_path / "card.json").write_text(json.dumps({"gpu": "Some Card", "skinny_linear": rows}))
    monkeypatch.setattr(tuned_tables, "TUNING_FOLDER", tmp_path)
    module._table.cache_clear()
    yield
    module._table.cache_clear()


@pytest.mark.parametrize(
    ("gpu", "shape", "num_rows", "expected"),
    [
        ("Some Card", (6, 4), 1, FMA),
        ("Some Card", (6, 4), 2, None),  # measured, and slower
        ("Some Card", (6, 4), 9, None),  # not measured
        ("Some Card", (4, 6), 1, None),
        ("Other Card", (6, 4), 1, None),
    ],
)
def test_table_gives_what_was_measured_on_this_card(table, monkeypatch, gpu, shape, num_rows, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
    assert tuned_launch(num_rows, _FakeWeight(*shape)) == expected


def test_committed_tables_can_be_read():
    for file in tuned_tables.TUNING_FOLDER.glob("*.json"):
        assert module._table(json.loads(file.read_text(encoding="utf-8"))["gpu"])
