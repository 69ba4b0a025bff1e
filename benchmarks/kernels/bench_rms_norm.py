"""RMS norm alone and with the residual addition: ours, torch's operators, torch's fused rms_norm."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from kernel_bench import Bench, Case

from lora_serve.kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-6


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def norm_case(bench: Bench, num_tokens: int, size: int) -> Case:
    weight = bench.randn(size)

    def make_call(provider: str) -> Callable[[], object]:
        x = bench.randn(num_tokens, size)
        out = torch.empty_like(x)
        return {
            "ours": lambda: rms_norm(x, weight, EPS, out=out),
            "torch": lambda: torch_rms_norm(x, weight),
            "torch_fused": lambda: torch.nn.functional.rms_norm(x, (size,), weight, EPS),
        }[provider]

    return Case("rms_norm", f"T={num_tokens} H={size}", (2 * num_tokens + 1) * size * 2, make_call)


def add_case(bench: Bench, num_tokens: int, size: int) -> Case:
    weight = bench.randn(size)

    def make_call(provider: str) -> Callable[[], object]:
        x, residual = bench.randn(num_tokens, size), bench.randn(num_tokens, size)
        out = torch.empty_like(x)

        def torch_fused() -> torch.Tensor:
            residual.add_(x)
            return torch.nn.functional.rms_norm(residual, (size,), weight, EPS)

        return {
            "ours": lambda: add_rms_norm(x, residual, weight, EPS, out=out),
            "torch": lambda: torch_rms_norm(residual.add_(x), weight),
            "torch_fused": torch_fused,
        }[provider]

    return Case("add_rms_norm", f"T={num_tokens} H={size}", (4 * num_tokens + 1) * size * 2, make_call)


def main() -> int:
    bench = Bench(__doc__)
    sizes = bench.sizes(1, 32, 128, 2048)
    cases = [norm_case(bench, num_tokens, 4096) for num_tokens in sizes]
    cases += [add_case(bench, num_tokens, 4096) for num_tokens in sizes]
    return bench.run(cases, ("ours", "torch", "torch_fused"))


if __name__ == "__main__":
    sys.exit(main())
