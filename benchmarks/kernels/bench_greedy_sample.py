"""The best token of each row: ours, and torch's max with its checks.

`ours_<logits>x<warps>` are other launch parameters of the same kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from kernel_bench import Bench, Case

from lora_serve.kernels import greedy_sample as module
from lora_serve.kernels.greedy_sample import greedy_sample, set_last_tokens

VOCAB_SIZE = 151_936
# Logits and warps of a program.
LAUNCHES = {"ours_2048x4": (2048, 4), "ours_8192x8": (8192, 8), "ours_4096x8": (4096, 8)}


def launched_with(block: int, num_warps: int, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        before = module._BLOCK, module._NUM_WARPS
        module._BLOCK, module._NUM_WARPS = block, num_warps
        call()
        module._BLOCK, module._NUM_WARPS = before

    return run


def greedy_case(bench: Bench, num_rows: int, vocab_size: int) -> Case:
    rows = bench.int32(list(range(num_rows)))
    failed = torch.zeros_like(rows)
    last = bench.int32([0] * (num_rows + 1))

    def make_call(provider: str) -> Callable[[], object]:
        logits = bench.randn(num_rows, vocab_size)
        out = torch.zeros_like(rows)

        def ours() -> None:
            greedy_sample(logits, rows, failed, last, out)

        def with_torch() -> None:
            best, ids = logits.max(dim=-1)  # NaN comes out as the largest
            is_good = torch.isfinite(best) & (failed == 0)
            out.copy_(torch.where(is_good, ids, -2))
            last[rows] = out

        if provider in LAUNCHES:
            return launched_with(*LAUNCHES[provider], ours)
        return {"ours": ours, "torch": with_torch}[provider]

    num_bytes = num_rows * vocab_size * logits_bytes(bench)
    return Case("greedy_sample", f"B={num_rows} V={vocab_size}", num_bytes, make_call)


def logits_bytes(bench: Bench) -> int:
    return torch.finfo(bench.dtype).bits // 8


def set_case(bench: Bench, num_rows: int) -> Case:
    def make_call(provider: str) -> Callable[[], object] | None:
        if provider not in {"ours", "torch"}:
            return None
        tokens, rows = bench.int32(list(range(num_rows))), bench.int32(list(range(num_rows)))
        failed, out = torch.zeros_like(rows), torch.zeros_like(rows)
        last = bench.int32([0] * (num_rows + 1))

        def with_torch() -> None:
            out.copy_(torch.where((failed != 0) | (tokens < 0), -2, tokens))
            last[rows] = out

        return {"ours": lambda: set_last_tokens(tokens, rows, failed, last, out), "torch": with_torch}[
            provider
        ]

    return Case("set_last_tokens", f"B={num_rows}", num_rows * 20, make_call)


def main() -> int:
    bench = Bench(__doc__)
    vocab_size = 10_000 if bench.is_smallest else VOCAB_SIZE
    cases = [greedy_case(bench, num_rows, vocab_size) for num_rows in bench.sizes(1, 8, 32, 128)]
    cases.append(set_case(bench, 128))
    return bench.run(cases, ("ours", *LAUNCHES, "torch"))


if __name__ == "__main__":
    sys.exit(main())
