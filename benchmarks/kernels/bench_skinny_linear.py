"""The linear layer of few rows: ours with the tuned parameters, and the vendor's library.

`ours_early` lets each launch begin while the one before it ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch.nn.functional as F
from kernel_bench import Bench, Case

from lora_serve.kernels.skinny_linear import skinny_linear

# Qwen3-8B: output and input features.
SHAPES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096))
_MAX_SETS = 12  # of weights; enough that none is in a cache when its turn comes again
_ROTATED_BYTES = 220 << 20


def linear_case(bench: Bench, num_rows: int, out_features: int, in_features: int) -> Case:
    num_bytes = 2 * out_features * in_features
    num_sets = min(_MAX_SETS, -(-_ROTATED_BYTES // num_bytes))
    scale = in_features**-0.5
    weights = [bench.randn(out_features, in_features).mul_(scale) for _ in range(num_sets)]
    turn = 0

    def make_call(provider: str) -> Callable[[], object] | None:
        nonlocal turn
        turn += 1
        weight, x = weights[turn % num_sets], bench.randn(num_rows, in_features)
        if bench.device == "cpu" and provider == "ours_early":
            return None
        return {
            "ours": lambda: skinny_linear(x, weight),
            "ours_early": lambda: skinny_linear(x, weight, launches_early=True),
            "torch": lambda: F.linear(x, weight),
        }[provider]

    return Case("skinny_linear", f"M={num_rows} N={out_features} K={in_features}", num_bytes, make_call)


def main() -> int:
    bench = Bench(__doc__)
    shapes = ((64, 128),) if bench.is_smallest or bench.device == "cpu" else SHAPES
    status = 0
    for shape in shapes:  # one after the other: the weights of all do not lie in memory at once
        cases = [linear_case(bench, num_rows, *shape) for num_rows in bench.sizes(1, 4, 8, 16, 32, 64)]
        status |= bench.run(cases, ("ours", "ours_early", "torch"))
    return status


if __name__ == "__main__":
    sys.exit(main())
