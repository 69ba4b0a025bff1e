"""Random tokens with and without truncation: ours, and torch's sorting sampler.

Cases by what the rows ask for: nothing, top_k 20, top_p 0.95, both. Logits are normal numbers, a flat
distribution: its nucleus is most of the vocabulary. `fp32` cases are rows whose logits were adjusted.
The torch provider is what can be captured in a graph: a full sort, and one draw by its own generator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from kernel_bench import Bench, Case

from lora_serve.kernels.draw_token import draw_token
from lora_serve.kernels.draw_token_floors import raise_floors_by_count, raise_floors_by_mass

VOCAB_SIZE = 151_936
# top_k and top_p; 0 = off.
CUTS = {"none": (0, 0.0), "top_k": (20, 0.0), "top_p": (0, 0.95), "both": (20, 0.95)}


def draw_case(bench: Bench, num_rows: int, vocab_size: int, cut: str, dtype: torch.dtype) -> Case:
    top_k, top_p = CUTS[cut]

    def make_call(provider: str) -> Callable[[], object]:
        logits = bench.randn(num_rows, vocab_size).to(dtype)
        rows, best = bench.int32(list(range(num_rows))), logits.argmax(dim=-1).to(torch.int32)
        temperature = torch.full((num_rows,), 0.6, device=bench.device)
        uniforms = torch.rand(num_rows, dtype=torch.float64, device=bench.device)
        no_floors, counts = torch.full_like(temperature, -torch.inf), torch.full_like(uniforms, top_k)
        shares, floors, tokens = torch.full_like(uniforms, top_p), no_floors.clone(), best.clone()

        def ours() -> None:
            floors.copy_(no_floors)
            tokens.copy_(best)
            if top_k:
                raise_floors_by_count(logits, rows, tokens, counts, temperature, floors)
            if top_p:
                raise_floors_by_mass(logits, rows, tokens, shares, temperature, floors)
            draw_token(logits, rows, tokens, temperature, floors, uniforms)

        def with_torch() -> None:
            scores, order = (logits.float() / 0.6).sort(dim=-1, descending=True)
            if top_k:
                scores[:, top_k:] = -torch.inf
            if top_p:
                p = scores.softmax(dim=-1)
                scores.masked_fill_(p.cumsum(dim=-1) - p >= top_p, -torch.inf)
            noise = torch.empty_like(scores).exponential_()
            place = (scores.softmax(dim=-1) / noise).argmax(dim=-1, keepdim=True)
            tokens.copy_(order.gather(1, place).squeeze(1))

        return {"ours": ours, "torch": with_torch}[provider]

    num_bytes = num_rows * vocab_size * torch.finfo(dtype).bits // 8
    name = str(dtype).removeprefix("torch.")
    return Case("draw_token", f"M={num_rows} V={vocab_size} {cut} {name}", num_bytes, make_call)


def main() -> int:
    bench = Bench(__doc__)
    vocab_size = 5_000 if bench.is_smallest else VOCAB_SIZE
    sizes = bench.sizes(1, 8, 32, 128)
    cases = [draw_case(bench, n, vocab_size, cut, bench.dtype) for cut in CUTS for n in sizes]
    if not bench.is_smallest:
        cases += [draw_case(bench, n, vocab_size, "both", torch.float32) for n in (1, 128)]
    return bench.run(cases)


if __name__ == "__main__":
    sys.exit(main())
