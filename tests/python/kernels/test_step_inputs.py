"""A step's inputs made on the device from a plan's block, against loops over tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.device_cases import DEVICES, int32
from lora_serve.kernels.reference_elementwise import (
    apply_page_table_deltas_reference,
    prepare_step_reference,
)
from lora_serve.kernels.step_inputs import apply_page_table_deltas, prepare_step

MAX_SEQS = 9
PAGE_SIZE = 4
UNWRITTEN = -77


@dataclass
class Row:
    """A row of a plan: its row of the page table, tokens already computed, and the step's tokens."""

    table_row: int
    num_computed: int
    tokens: list[int]


@dataclass
class Step:
    """A plan's arrays, with padded rows and tokens behind the real ones."""

    arrays: list[Tensor]
    page_table: Tensor
    last_tokens: Tensor
    page_indptr: Tensor


def make_step(
    device: str, rows: list[Row], *, num_rows: int | None = None, num_tokens: int | None = None
) -> Step:
    num_rows = len(rows) if num_rows is None else num_rows
    padding = num_rows - len(rows)
    lengths = [len(row.tokens) for row in rows]
    starts = [sum(lengths[:b]) for b in range(len(rows) + 1)]
    tokens = [token for row in rows for token in row.tokens]
    num_tokens = len(tokens) if num_tokens is None else num_tokens
    pages = [-(-(row.num_computed + len(row.tokens)) // PAGE_SIZE) for row in rows] + [1] * padding
    rng = random.Random(len(tokens))
    width = max(pages) + 2
    table = [[rng.randrange(10_000) for _ in range(width)] for _ in range(MAX_SEQS + 1)]
    last = [rng.randrange(1000) for _ in range(MAX_SEQS + 1)]
    arrays = [
        lengths + [0] * padding,
        [row.num_computed for row in rows] + [0] * padding,
        starts + [starts[-1]] * padding,
        [row.table_row for row in rows] + [MAX_SEQS] * padding,
        tokens + [0] * (num_tokens - len(tokens)),
    ]
    return Step(
        [int32(device, values) for values in arrays],
        torch.tensor(table, dtype=torch.int32, device=device),
        int32(device, last),
        int32(device, [sum(pages[:b]) for b in range(num_rows + 1)]),
    )


def check_step(step: Step) -> Tensor:
    """Run a step into buffers of rubbish, compare all of them, and give the failed rows."""
    device, num_tokens, num_rows = step.page_table.device, len(step.arrays[4]), len(step.arrays[3])
    num_pages = int(step.page_indptr[-1])
    ids, positions, slots = (torch.full((num_tokens,), UNWRITTEN, device=device) for _ in range(3))
    indices = torch.full((num_pages + 5,), UNWRITTEN, dtype=torch.int32, device=device)
    failed = torch.full((num_rows,), UNWRITTEN, dtype=torch.int32, device=device)
    table, last = step.page_table.clone(), step.last_tokens.clone()

    prepare_step(
        *step.arrays,
        step.page_table,
        step.last_tokens,
        step.page_indptr,
        page_size=PAGE_SIZE,
        token_ids_out=ids,
        positions_out=positions,
        slot_mapping_out=slots,
        page_indices_out=indices,
        row_failed_out=failed,
    )

    arrays = [array.cpu() for array in step.arrays]
    expected = prepare_step_reference(
        *arrays, table.cpu(), last.cpu(), step.page_indptr.cpu(), page_size=PAGE_SIZE
    )
    assert torch.equal(ids.cpu(), expected.token_ids)
    assert torch.equal(positions.cpu(), expected.positions)
    assert torch.equal(slots.cpu(), expected.slot_mapping)
    assert torch.equal(indices[:num_pages].cpu(), expected.page_indices)
    assert torch.equal(failed.cpu(), expected.row_failed)
    assert (indices[num_pages:] == UNWRITTEN).all()
    assert torch.equal(step.page_table, table)
    assert torch.equal(step.last_tokens, last)
    return failed.cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_step_of_decodes_and_chunks_gets_its_tokens_positions_and_slots(device):
    rows = [Row(3, 17, [-1]), Row(0, 8, [5]), Row(8, 0, list(range(1, 12))), Row(5, 7, [9, 8, 7])]
    assert check_step(make_step(device, rows)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_real", [1, 3, 8])
def test_padded_rows_of_a_decode_step_get_harmless_inputs(device, num_real):
    rows = [Row(b, 5 * b + 3, [-1 if b % 2 else 40 + b]) for b in range(num_real)]
    failed = check_step(make_step(device, rows, num_rows=8, num_tokens=8))
    assert failed.tolist() == [0] * 8


@pytest.mark.parametrize("device", DEVICES)
def test_more_padded_tokens_than_padded_rows_are_written_too(device):
    check_step(make_step(device, [Row(2, 0, [4, 5, 6])], num_rows=2, num_tokens=16))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nothing", [-1, -2])
def test_row_without_a_last_token_runs_with_token_0_and_is_marked(device, nothing):
    rows = [Row(0, 3, [-1]), Row(1, 4, [-1]), Row(2, 4, [7]), Row(4, 2, [3, -1])]
    step = make_step(device, rows)
    step.last_tokens[1] = nothing
    step.last_tokens[2] = nothing  # known tokens do not look there
    step.last_tokens[4] = nothing
    assert check_step(step).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("device", DEVICES)
def test_unknown_token_behind_known_ones_is_filled(device):
    check_step(make_step(device, [Row(1, 0, [3, 4, 5, -1]), Row(2, 0, [6])]))


@pytest.mark.parametrize("device", DEVICES)
def test_row_longer_than_a_block_is_written_to_its_end(device):
    rows = [Row(1, 2, list(range(2500))), Row(6, 4800, [-1])]
    check_step(make_step(device, rows, num_rows=3, num_tokens=4000))


@pytest.mark.parametrize("device", DEVICES)
def test_page_indices_behind_the_table_are_0(device):
    """More indices than a row has entries: the caller's mistake, but never a read outside the table."""
    step = make_step(device, [Row(MAX_SEQS - 1, 0, [1])])
    step.page_table[MAX_SEQS - 1] = step.page_table[MAX_SEQS] = 5
    width = step.page_table.shape[1]
    step.page_indptr[1] = width + 3
    indices = torch.full((width + 3,), UNWRITTEN, dtype=torch.int32, device=device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    prepare_step(
        *step.arrays,
        step.page_table,
        step.last_tokens,
        step.page_indptr,
        page_size=PAGE_SIZE,
        token_ids_out=one,
        positions_out=one.clone(),
        slot_mapping_out=one.clone(),
        page_indices_out=indices,
        row_failed_out=int32(device, [0]),
    )
    assert indices.tolist() == [5] * width + [0, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_deltas_change_their_entries_and_no_other(device):
    table = torch.arange(10 * 2000, dtype=torch.int32, device=device).view(10, 2000)
    lengths, rows, starts = [1, 1500, 3, 2], [4, 0, 9, 8], [0, 500, 7, 1998]
    offsets = int32(device, [sum(lengths[:d]) for d in range(5)])
    pages = -1 - torch.arange(sum(lengths), dtype=torch.int32, device=device)
    deltas = (int32(device, rows), int32(device, starts), offsets, pages)
    expected = apply_page_table_deltas_reference(table, *deltas)

    apply_page_table_deltas(table, *deltas)

    assert torch.equal(table, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_delta_outside_the_table_writes_nothing_there(device):
    memory = torch.zeros(5, 4, dtype=torch.int32, device=device)
    table = memory[1:4]
    apply_page_table_deltas(
        table,
        int32(device, [-1, 3, 0]),
        int32(device, [0, 0, 3]),
        int32(device, [0, 1, 2, 4]),
        int32(device, [7, 7, 8, 9]),
    )
    expected = torch.zeros(5, 4, dtype=torch.int32)
    expected[1, 3] = 8
    assert torch.equal(memory.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_step_without_deltas_leaves_the_table(device):
    table = torch.ones(3, 4, dtype=torch.int32, device=device)
    none = int32(device, [])
    apply_page_table_deltas(table, none, none, int32(device, [0]), none)
    assert (table == 1).all()


@pytest.mark.gpu
def test_captured_step_follows_what_is_written_into_its_arrays():
    step = make_step("cuda", [Row(1, 6, [-1]), Row(4, 9, [3])], num_rows=4, num_tokens=4)
    outputs = {
        "token_ids_out": torch.zeros(4, dtype=torch.int64, device="cuda"),
        "positions_out": torch.zeros(4, dtype=torch.int64, device="cuda"),
        "slot_mapping_out": torch.zeros(4, dtype=torch.int64, device="cuda"),
        "page_indices_out": torch.zeros(40, dtype=torch.int32, device="cuda"),
        "row_failed_out": torch.zeros(4, dtype=torch.int32, device="cuda"),
    }

    def run() -> None:
        tables = (step.page_table, step.last_tokens, step.page_indptr)
        prepare_step(*step.arrays, *tables, page_size=PAGE_SIZE, **outputs)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    later = make_step("cuda", [Row(2, 3, [-1]), Row(7, 1, [8]), Row(0, 4, [-1])], num_rows=4, num_tokens=4)
    for mine, new in zip(step.arrays, later.arrays, strict=True):
        mine.copy_(new)
    step.page_indptr.copy_(later.page_indptr)
    graph.replay()

    arrays = [array.cpu() for array in step.arrays]
    tables = (step.page_table.cpu(), step.last_tokens.cpu(), step.page_indptr.cpu())
    expected = prepare_step_reference(*arrays, *tables, page_size=PAGE_SIZE)
    assert torch.equal(outputs["token_ids_out"].cpu(), expected.token_ids)
    assert torch.equal(outputs["positions_out"].cpu(), expected.positions)
    assert torch.equal(outputs["slot_mapping_out"].cpu(), expected.slot_mapping)
    assert torch.equal(outputs["row_failed_out"].cpu(), expected.row_failed)


def test_unfit_shapes_are_refused_by_name():
    table = torch.ones(3, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="2 delta rows with 1 starts"):
        apply_page_table_deltas(table, int32("cpu", [1, 2]), int32("cpu", [0]), int32("cpu", [0]), table[0])
    with pytest.raises(ValueError, match="contiguous"):
        apply_page_table_deltas(
            table[:, ::2], int32("cpu", [1]), int32("cpu", [0]), int32("cpu", [0, 0]), table[0]
        )
    step = make_step("cpu", [Row(1, 0, [1, 2])])
    step.page_indptr = step.page_indptr[:1]
    with pytest.raises(ValueError, match="for 1 rows and 2 tokens"):
        check_step(step)
