"""A step's inputs from its plan on the device: ours, and torch's operators for a step of decodes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from kernel_bench import Bench, Case

from lora_serve.kernels.step_inputs import apply_page_table_deltas, prepare_step

PAGE_SIZE = 16


def decode_case(bench: Bench, num_rows: int, context: int) -> Case:
    """Rows of one token each, all of them unknown to the plan."""
    num_pages = context // PAGE_SIZE + 1
    indptr = bench.int32([row * num_pages for row in range(num_rows + 1)])

    def make_call(provider: str) -> Callable[[], object]:
        table = torch.randint(10_000, (num_rows + 1, num_pages), dtype=torch.int32, device=bench.device)
        last = torch.randint(10_000, (num_rows + 1,), dtype=torch.int32, device=bench.device)
        ones, computed = bench.int32([1] * num_rows), bench.int32([context] * num_rows)
        starts = bench.int32(list(range(num_rows + 1)))
        rows = torch.randperm(num_rows, device=bench.device).to(torch.int32)
        unknown = bench.int32([-1] * num_rows)
        ids = torch.zeros(num_rows, dtype=torch.int64, device=bench.device)
        positions, slots = ids.clone(), ids.clone()
        indices = torch.zeros(num_rows * num_pages, dtype=torch.int32, device=bench.device)
        failed = torch.zeros(num_rows, dtype=torch.int32, device=bench.device)

        def ours() -> None:
            prepare_step(
                ones,
                computed,
                starts,
                rows,
                unknown,
                table,
                last,
                indptr,
                page_size=PAGE_SIZE,
                token_ids_out=ids,
                positions_out=positions,
                slot_mapping_out=slots,
                page_indices_out=indices,
                row_failed_out=failed,
            )

        def with_torch() -> None:
            long_rows = rows.long()
            tokens = torch.where(unknown < 0, last[long_rows], unknown)
            failed.copy_(tokens < 0)
            ids.copy_(tokens.clamp(min=0))
            positions.copy_(computed)
            pages = table[long_rows]
            slot_pages = pages.gather(1, (positions // PAGE_SIZE)[:, None])[:, 0]
            slots.copy_(slot_pages.long() * PAGE_SIZE + positions % PAGE_SIZE)
            indices.copy_(pages.view(-1))  # all rows have as many pages

        return {"ours": ours, "torch": with_torch}[provider]

    num_bytes = num_rows * (2 * num_pages * 4 + 7 * 4 + 3 * 8)
    return Case("prepare_step", f"B={num_rows} tokens=1 context={context}", num_bytes, make_call)


def chunk_case(bench: Bench, num_tokens: int) -> Case:
    """One prefill chunk; torch's way needs sizes on the host, so there is none."""
    num_pages = num_tokens // PAGE_SIZE

    def make_call(provider: str) -> Callable[[], object] | None:
        if provider != "ours":
            return None
        table = torch.randint(10_000, (2, num_pages), dtype=torch.int32, device=bench.device)
        tokens = torch.randint(10_000, (num_tokens,), dtype=torch.int32, device=bench.device)
        arrays = [bench.int32(values) for values in ([num_tokens], [0], [0, num_tokens], [0])]
        outputs = [torch.zeros(num_tokens, dtype=torch.int64, device=bench.device) for _ in range(3)]
        last, indptr, failed = bench.int32([5, 5]), bench.int32([0, num_pages]), bench.int32([0])
        indices = torch.zeros(num_pages, dtype=torch.int32, device=bench.device)
        return lambda: prepare_step(
            *arrays,
            tokens,
            table,
            last,
            indptr,
            page_size=PAGE_SIZE,
            token_ids_out=outputs[0],
            positions_out=outputs[1],
            slot_mapping_out=outputs[2],
            page_indices_out=indices,
            row_failed_out=failed,
        )

    return Case("prepare_step", f"B=1 tokens={num_tokens}", num_tokens * 28 + num_pages * 12, make_call)


def delta_case(bench: Bench, num_deltas: int, num_pages: int) -> Case:
    def make_call(provider: str) -> Callable[[], object]:
        table = torch.zeros(num_deltas + 1, num_pages, dtype=torch.int32, device=bench.device)
        rows = torch.randperm(num_deltas, device=bench.device).to(torch.int32)
        starts = torch.zeros_like(rows)
        offsets = bench.int32([delta * num_pages for delta in range(num_deltas + 1)])
        pages = torch.randint(10_000, (num_deltas * num_pages,), dtype=torch.int32, device=bench.device)

        def with_torch() -> None:
            table[rows.long()] = pages.view(num_deltas, num_pages)

        return {
            "ours": lambda: apply_page_table_deltas(table, rows, starts, offsets, pages),
            "torch": with_torch,
        }[provider]

    num_bytes = num_deltas * (2 * num_pages + 3) * 4
    shape = f"deltas={num_deltas} pages={num_pages}"
    return Case("apply_page_table_deltas", shape, num_bytes, make_call)


def main() -> int:
    bench = Bench(__doc__)
    cases = [decode_case(bench, num_rows, 1024) for num_rows in bench.sizes(1, 32, 128)]
    if not bench.is_smallest:
        cases += [decode_case(bench, 32, 32_768), chunk_case(bench, 8192)]
        cases += [delta_case(bench, 8, 1), delta_case(bench, 128, 128)]
    return bench.run(cases)


if __name__ == "__main__":
    sys.exit(main())
