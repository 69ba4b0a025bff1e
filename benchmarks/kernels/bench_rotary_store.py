"""Norm of heads, rotation and storing into pages, with Qwen3-8B's heads: ours and torch's operators.

`ours_<heads>x<warps>` are other launch parameters of the same kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest import mock

import torch
from kernel_bench import Bench, Case

from lora_serve.kernels import rotary_store
from lora_serve.kernels.rotary_store import norm_rotary_store

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
EPS, NUM_POSITIONS = 1e-6, 4096
# Heads and warps of a program.
LAUNCHES = {"ours_8x2": (8, 2), "ours_16x4": (16, 4), "ours_8x1": (8, 1)}


def torch_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (HEAD_DIM,), weight, EPS)


def torch_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def launched_with(num_heads: int, num_warps: int, call: Callable[[], object]) -> Callable[[], object]:
    parameters = {
        "_ELEMENTS_OF_A_WARP": num_heads * HEAD_DIM // num_warps,
        "_MOST_DECODE_TOKENS": -1,  # The number of warps of a prefill counts for any number of tokens.
        "_WARPS_OF_A_PREFILL": num_warps,
    }

    def run() -> None:
        with mock.patch.multiple(rotary_store, **parameters):
            call()

    return run


def rotary_case(bench: Bench, num_tokens: int, has_norm: bool) -> Case:
    num_pages = -(-max(num_tokens, 64) // PAGE_SIZE) * 8
    # A page-major pool of two layers, as the executor's: pages lie further apart than they are long.
    pool = torch.zeros(
        num_pages, 2, 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=bench.dtype, device=bench.device
    )
    k_pages, v_pages = pool[:, 1, 0], pool[:, 1, 1]
    cos_sin = torch.randn(NUM_POSITIONS, HEAD_DIM, device=bench.device)
    q_weight, k_weight = (bench.randn(HEAD_DIM), bench.randn(HEAD_DIM)) if has_norm else (None, None)

    def make_call(provider: str) -> Callable[[], object]:
        qkv = bench.randn(num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
        positions = torch.randint(NUM_POSITIONS, (num_tokens,), device=bench.device)
        slots = torch.randperm(num_pages * PAGE_SIZE, device=bench.device)[:num_tokens]

        def ours() -> object:
            return norm_rotary_store(
                qkv, positions, cos_sin, slots, k_pages, v_pages, q_weight, k_weight, EPS
            )

        def with_torch() -> torch.Tensor:
            heads = qkv.view(num_tokens, -1, HEAD_DIM)
            query, key, value = heads.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
            if q_weight is not None and k_weight is not None:
                query, key = torch_norm(query, q_weight), torch_norm(key, k_weight)
            cos, sin = cos_sin[positions].to(qkv.dtype)[:, None].chunk(2, dim=-1)
            k_pages[slots // PAGE_SIZE, slots % PAGE_SIZE] = torch_rotary(key, cos, sin)
            v_pages[slots // PAGE_SIZE, slots % PAGE_SIZE] = value
            return torch_rotary(query, cos, sin)

        if provider in LAUNCHES:
            return launched_with(*LAUNCHES[provider], ours)
        return {"ours": ours, "torch": with_torch}[provider]

    num_elements = 2 * num_tokens * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    shape = f"T={num_tokens} heads={NUM_HEADS}/{NUM_KV_HEADS} D={HEAD_DIM} norm={int(has_norm)}"
    return Case("norm_rotary_store", shape, num_elements * 2 + num_tokens * (HEAD_DIM * 4 + 16), make_call)


def main() -> int:
    bench = Bench(__doc__)
    cases = [rotary_case(bench, num_tokens, True) for num_tokens in bench.sizes(1, 32, 128, 2048)]
    cases += [rotary_case(bench, num_tokens, False) for num_tokens in bench.sizes(128, 2048)]
    return bench.run(cases, ("ours", *LAUNCHES, "torch"))


if __name__ == "__main__":
    sys.exit(main())
