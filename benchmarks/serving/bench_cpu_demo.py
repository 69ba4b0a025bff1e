"""Output tokens per second of the demo model on a CPU, beside transformers + peft.

Every provider answers the same prompts greedily with as many new tokens. transformers + peft cannot mix
adapters in a batch, so it runs one batch an adapter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import append_rows

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.demo.paths import demo_paths
from lora_serve.llm import LLM

Names = list["str | None"]


def prompts_of(num_requests: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Random token prompts, the same for every provider."""
    generator = torch.Generator().manual_seed(0)
    low = 16  # above the special tokens
    return torch.randint(low, vocab_size, (num_requests, num_tokens), generator=generator).tolist()


def run_ours(
    prompts: list[list[int]], names: Names, num_new_tokens: int, load_adapters: bool
) -> Callable[[], float]:
    """A closed batch through `LLM`; returns a function that runs it once and gives the seconds it took."""
    llm = LLM(
        str(demo_paths().model),
        device="cpu",
        dtype="float32",
        num_device_pages=2048,
        enable_prefix_caching=False,
    )
    if load_adapters:
        for name, path in demo_paths().adapters.items():
            llm.load_lora_adapter(name, str(path))
    params = SamplingParams(temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]

    def once() -> float:
        start = time.perf_counter()
        llm.generate(requests, params, lora_request=names)
        return time.perf_counter() - start

    return once


def run_peft(prompts: list[list[int]], names: Names, num_new_tokens: int) -> Callable[[], float]:
    """One `generate` call an adapter with transformers + peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_paths().model, dtype=torch.float32)
    adapters = sorted({name for name in names if name is not None})
    for name in adapters:
        path = str(demo_paths().adapters[name])
        if isinstance(model, PeftModel):
            model.load_adapter(path, name)
        else:
            model = PeftModel.from_pretrained(model, path, name)
    model.eval()

    @torch.inference_mode()
    def once() -> float:
        start = time.perf_counter()
        for name in sorted(set(names), key=str):
            batch = torch.tensor([p for p, n in zip(prompts, names, strict=True) if n == name])
            options = {
                "max_new_tokens": num_new_tokens,
                "min_new_tokens": num_new_tokens,
                "do_sample": False,
                "attention_mask": torch.ones_like(batch),
                "pad_token_id": 0,
            }
            if name is None and adapters:
                with model.disable_adapter():
                    model.generate(batch, **options)
                continue
            if name is not None:
                model.set_adapter(name)
            model.generate(batch, **options)
        return time.perf_counter() - start

    return once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="one short run, nothing is written")
    args = parser.parse_args()
    num_requests, num_prompt_tokens, num_new_tokens, repeats = (
        (4, 16, 4, 1) if args.smallest else (32, 128, 64, 5)
    )
    adapters = sorted(demo_paths().adapters)
    prompts = prompts_of(num_requests, num_prompt_tokens, vocab_size=1000)
    workloads: dict[str, tuple[Names, bool]] = {
        "base": ([None] * num_requests, False),
        "adapters loaded, unused": ([None] * num_requests, True),
        "1 adapter": ([adapters[1]] * num_requests, True),
        "4 adapters": ([adapters[index % 4] for index in range(num_requests)], True),
    }
    rows: list[dict[str, object]] = []
    for workload, (names, load_adapters) in workloads.items():
        for provider in ("ours", "transformers+peft"):
            if provider == "ours":
                once = run_ours(prompts, names, num_new_tokens, load_adapters)
            else:
                once = run_peft(prompts, names, num_new_tokens)
            once()
            seconds = [once() for _ in range(repeats)]
            rates = sorted(num_requests * num_new_tokens / value for value in seconds)
            row = {
                "workload": workload,
                "provider": provider,
                "num_requests": num_requests,
                "num_prompt_tokens": num_prompt_tokens,
                "num_new_tokens": num_new_tokens,
                "min_tokens_per_s": round(rates[0], 1),
                "p50_tokens_per_s": round(statistics.median(rates), 1),
                "max_tokens_per_s": round(rates[-1], 1),
            }
            rows.append(row)
            print(f"{workload:26} {provider:18} {row['p50_tokens_per_s']:>9} tokens/s")
    if not args.smallest:
        print(f"appended to {append_rows('cpu_demo', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
