"""The gated activation: ours and torch's two operators."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from kernel_bench import Bench, Case

from lora_serve.kernels.silu_mul import silu_mul


def silu_case(bench: Bench, num_tokens: int, size: int) -> Case:
    def make_call(provider: str) -> Callable[[], object]:
        gate_up = bench.randn(num_tokens, 2 * size)
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
        return {
            "ours": lambda: silu_mul(gate_up, out=out),
            "torch": lambda: torch.nn.functional.silu(gate) * up,
        }[provider]

    return Case("silu_mul", f"T={num_tokens} I={size}", 3 * num_tokens * size * 2, make_call)


def main() -> int:
    bench = Bench(__doc__)
    return bench.run([silu_case(bench, num_tokens, 12288) for num_tokens in bench.sizes(1, 32, 128, 2048)])


if __name__ == "__main__":
    sys.exit(main())
