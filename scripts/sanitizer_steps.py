"""Runs the demo on a CUDA device for a few steps, for compute-sanitizer to look at.

    compute-sanitizer --tool memcheck --error-exitcode 9 python scripts/sanitizer_steps.py

Prefill in chunks, decode steps from graphs (with --eager without); greedy rows and rows that are sampled by
their parameters; base and every adapter of the demo in one batch; so few pages that requests are preempted,
and a host tier that takes their pages.
"""

from __future__ import annotations

import argparse
import sys
import time

from torch import Tensor

from lora_serve.common.config import EngineConfig
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.demo.paths import demo_paths
from lora_serve.engine.engine_core import EngineCore
from lora_serve.engine.messages import EngineRequest
from lora_serve.executor.decode_graphs import DecodeGraphs
from lora_serve.executor.device_inputs import DeviceStep

NUM_PROMPT_TOKENS = (5, 14, 29, 13, 11, 22, 9, 15)
NUM_AT_FIRST = 6
"""The others come when the first are decoding."""
STALL_S = 0.002


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="steps to run (default: %(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--eager", action="store_true", help="no graphs")
    return parser.parse_args()


def make_config(options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        model=str(demo_paths().model),
        device=options.device,
        dtype=options.dtype,
        attention_backend=options.attention_backend,
        enforce_eager=options.eager,
        cuda_graph_sizes=[1, 4, 8],
        max_num_seqs=8,
        max_num_batched_tokens=32,
        max_model_len=128,
        num_device_pages=10,
        kv_host_memory_gb=2**-6,
        lora_memory_gb=2**-6,
        lora_host_memory_gb=2**-5,
    )


def load_adapters(core: EngineCore) -> list[str | None]:
    """Load the demo's adapters; give what requests may name."""
    names: list[str | None] = [None]
    for name, path in demo_paths().adapters.items():
        load = core.load_adapter(name, str(path))
        while not load.done():
            core.step()
            core.wait_for_news(STALL_S)
        load.result()
        names.append(name)
    return names


def add_requests(core: EngineCore, names: list[str | None], numbers: range) -> None:
    for number in numbers:
        num_tokens = NUM_PROMPT_TOKENS[number]
        params = (
            SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
            if number < NUM_AT_FIRST
            else SamplingParams(temperature=1.0, top_p=0.9, seed=number, max_tokens=6, logprobs=2)
        )
        core.add_request(
            EngineRequest(
                request_id=number,
                prompt_token_ids=[3 + (37 * number + 11 * place) % 1000 for place in range(num_tokens)],
                sampling_params=params,
                lora_name=names[number % len(names)],
            )
        )


def count_replays() -> list[int]:
    """A list whose one number rises with each step that is replayed from a graph."""
    count, replay = [0], DecodeGraphs.replay

    def counted(graphs: DecodeGraphs, step: DeviceStep) -> Tensor:
        count[0] += 1
        return replay(graphs, step)

    DecodeGraphs.replay = counted  # type: ignore[method-assign]
    return count


def main() -> int:
    options = parse_options()
    num_replays = count_replays()
    core = EngineCore(make_config(options))
    try:
        names = load_adapters(core)
        numbers = range(len(NUM_PROMPT_TOKENS))
        add_requests(core, names, numbers[:NUM_AT_FIRST])
        first_step, num_tokens, begin = core.num_steps, 0, time.perf_counter()
        while core.num_steps - first_step < options.steps and core.has_work:
            if core.num_steps - first_step == options.steps // 2 and numbers[NUM_AT_FIRST:]:
                add_requests(core, names, numbers[NUM_AT_FIRST:])
                numbers = numbers[:0]
            num_tokens += sum(len(output.new_token_ids) for output in core.step())
            if core.is_stalled:
                core.wait_for_news(STALL_S)
        core.settle()
        if core.failure is not None:
            print(f"the engine has stopped: {core.failure}", file=sys.stderr)
            return 1
        stats = core.stats()
        print(
            f"{core.num_steps - first_step} steps ({num_replays[0]} from graphs), {num_tokens} tokens, "
            f"{stats.total_preemptions} preemptions, {time.perf_counter() - begin:.1f} s"
        )
    finally:
        core.close()
    return 0 if num_tokens else 1


if __name__ == "__main__":
    sys.exit(main())
