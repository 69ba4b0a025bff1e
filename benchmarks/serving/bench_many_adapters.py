"""Requests/s with 1,000 adapters of which few fit in memory, beside the same traffic over those that fit.

The engine runs in this process with a small model on the CPU. First the saturation: clients in a closed loop
over 20 adapters, all on the device. Then an open loop, Poisson at 60% of that rate, zipf(1): over the 20, and
over 1,000 registered ones of which 200 fit on the host and 20 on the device. Both have the same arrivals and
lengths. Completions count from the arrival of the middle request on: waits grow until enough requests of an
adapter share its turn, and a run must be long beside that. `live_at_middle` and `live_at_end` show whether it
was: requests that had arrived and were not answered.

Each set of adapters has a saturation of its own as well, with four times the clients, so that requests of an
adapter meet. Where that of the 1,000 is above the arrivals, the device's places are enough for them;
`adapters_per_step` says how many of the 20 the steps used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # Before torch is imported: threads as in the engine's own process.
    from lora_serve.engine.process_handle import make_environment

    os.environ.update(make_environment())

import numpy as np
from machine_load import CoreUse
from result_file import append_rows

from lora_serve.common.config import EngineConfig
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.engine_core import EngineCore
from lora_serve.engine.engine_process import STALLED_POLL_MS, settle_interpreter
from lora_serve.engine.messages import EngineRequest
from lora_serve.testing.adapters import make_random_adapter
from lora_serve.testing.models import make_random_model

PROMPT_TOKENS = 32
OUTPUT_TOKENS = 16
VOCAB_SIZE = 256
LOAD_SHARE = 0.6


@dataclass(frozen=True)
class Sizes:
    """How large a run is."""

    num_adapters: int = 1000
    num_host_adapters: int = 200
    num_device_adapters: int = 20
    num_requests: int = 20_000
    num_clients: int = 64
    repeats: int = 1


SMALLEST = Sizes(
    num_adapters=12, num_host_adapters=6, num_device_adapters=3, num_requests=20, num_clients=4, repeats=1
)


@dataclass
class Traffic:
    """Requests on their way through an engine, and what became of them.

    Parameters
    ----------
    core
        The engine.
    names
        The adapters, the most popular one first.
    seed
        Of prompts and choices.
    """

    core: EngineCore
    names: list[str]
    seed: int
    first_token_ms: list[float] = field(default_factory=list)
    num_completed: int = 0
    _sent_at: dict[int, float] = field(default_factory=dict)
    _has_token: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        weights = 1.0 / np.arange(1, len(self.names) + 1)
        self._popularity = weights / weights.sum()

    @property
    def num_live(self) -> int:
        return len(self._sent_at)

    def send(self, request_id: int, arrived_at: float) -> None:
        name = self.names[int(self._random.choice(len(self.names), p=self._popularity))]
        prompt = self._random.integers(0, VOCAB_SIZE, PROMPT_TOKENS).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        self.core.add_request(
            EngineRequest(
                request_id=request_id, prompt_token_ids=prompt, sampling_params=params, lora_name=name
            )
        )
        self._sent_at[request_id] = arrived_at

    def step(self) -> None:
        """One step of the engine, or a short wait where it has nothing to do."""
        outputs = self.core.step()
        if self.core.failure is not None:
            raise RuntimeError(self.core.failure)
        for output in outputs:
            if output.error is not None:
                raise output.error.to_exception()
            if output.request_id not in self._has_token and output.new_token_ids:
                self._has_token.add(output.request_id)
                waited_s = time.perf_counter() - self._sent_at[output.request_id]
                self.first_token_ms.append(waited_s * 1e3)
            if output.finish_reason is not None:
                del self._sent_at[output.request_id]
                self._has_token.discard(output.request_id)
                self.num_completed += 1
        if not outputs and self.core.is_stalled:
            self.core.wait_for_news(STALLED_POLL_MS / 1e3)


class Ids:
    """Request numbers, never the same."""

    def __init__(self) -> None:
        self._next = 0

    def take(self) -> int:
        self._next += 1
        return self._next


def closed_loop(traffic: Traffic, ids: Ids, num_clients: int, num_requests: int) -> float:
    """Requests/s while so many clients each wait for an answer before they ask again."""
    begin = time.perf_counter()
    while traffic.num_completed < num_requests:
        while traffic.num_live < num_clients:
            traffic.send(ids.take(), time.perf_counter())
        traffic.step()
    rate = traffic.num_completed / (time.perf_counter() - begin)
    while traffic.num_live:
        traffic.step()
    return rate


@dataclass(frozen=True)
class OpenLoop:
    """What became of arrivals at a given rate, from the middle one to the last.

    Parameters
    ----------
    completed_per_s
        Requests/s. While the engine keeps up, that is the rate of arrivals, however long each request takes;
        less means that ever more of them wait.
    live_at_middle, live_at_end
        Requests that had arrived and were not answered.
    """

    completed_per_s: float
    live_at_middle: int
    live_at_end: int


def open_loop(traffic: Traffic, ids: Ids, rate: float, num_requests: int) -> OpenLoop:
    """Send requests at random times, whatever becomes of them."""
    gaps = np.random.default_rng(traffic.seed + 1).exponential(1 / rate, num_requests)
    arrivals = (time.perf_counter() + np.cumsum(gaps)).tolist()
    num_sent = num_before = live_at_middle = 0
    middle = num_requests // 2
    while num_sent < num_requests:
        while num_sent < num_requests and arrivals[num_sent] <= time.perf_counter():
            traffic.send(ids.take(), arrivals[num_sent])
            num_sent += 1
            if num_sent == middle:
                num_before, live_at_middle = traffic.num_completed, traffic.num_live
        if traffic.core.has_work:
            traffic.step()
        elif num_sent < num_requests:
            time.sleep(max(0.0, min(1e-3, arrivals[num_sent] - time.perf_counter())))
    took_s = time.perf_counter() - arrivals[middle - 1]
    result = OpenLoop((traffic.num_completed - num_before) / took_s, live_at_middle, traffic.num_live)
    while traffic.num_live:
        traffic.step()
    return result


def make_engine(folder: Path, sizes: Sizes, lora_rank: int) -> tuple[EngineCore, list[str]]:
    """The engine with all adapters registered, the most popular one first."""
    model = folder / "model"
    make_random_model(model, "Qwen3ForCausalLM", vocab_size=VOCAB_SIZE)
    model_config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    names = [f"adapter-{index}" for index in range(sizes.num_adapters)]
    for seed, name in enumerate(names):
        make_random_adapter(folder / name, model_config, rank=lora_rank, seed=seed)
    num_bytes = (folder / names[0] / "adapter_model.safetensors").stat().st_size
    config = EngineConfig(
        model=str(model),
        device="cpu",
        num_device_pages=2048,
        max_model_len=256,
        max_num_seqs=64,
        enable_prefix_caching=False,
        # A little less than the file, whose header is not kept.
        lora_memory_gb=sizes.num_device_adapters * num_bytes / 2**30,
        lora_host_memory_gb=sizes.num_host_adapters * num_bytes / 2**30,
    )
    core = EngineCore(config)
    for name in reversed(names):  # So that host memory begins with those that are asked for most.
        load = core.load_adapter(name, str(folder / name))
        while not load.done():
            core.step()
            if core.is_stalled:
                core.wait_for_news(STALLED_POLL_MS / 1e3)
        load.result()
    return core, names


class Counts:
    """What the engine has counted since this was made."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._before = self._read()
        self._began = time.perf_counter()

    def figures(self) -> dict[str, object]:
        took_s = time.perf_counter() - self._began
        counts = {name: count - self._before[name] for name, count in self._read().items()}
        steps = counts["steps"]
        return {
            "rows_per_step": round(counts["rows"] / steps, 1),
            "adapters_per_step": round(counts["adapters"] / steps, 1),
            "ms_per_step": round(took_s / steps * 1e3, 2),
            "loads_to_device": counts["loads"],
            "reads_from_disk": counts["reads"],
        }

    def _read(self) -> dict[str, int]:
        stats = self._core.stats()
        return {
            "steps": stats.total_steps,
            "rows": stats.total_decode_rows + stats.total_prefill_rows,
            "adapters": stats.total_step_adapters,
            "loads": stats.total_adapter_loads,
            "reads": sum(info.total_reads for info in self._core.adapters()),
        }


def bench(core: EngineCore, names: list[str], sizes: Sizes) -> list[dict[str, object]]:
    ids = Ids()
    few = names[: sizes.num_device_adapters]
    closed_loop(Traffic(core, few, 0), ids, sizes.num_clients, max(10, sizes.num_requests // 20))
    rows: list[dict[str, object]] = []
    for repeat in range(sizes.repeats):
        saturation = closed_loop(Traffic(core, few, repeat), ids, sizes.num_clients, sizes.num_requests // 10)
        rate = LOAD_SHARE * saturation
        few_per_s = None
        for adapters in (few, names):
            own = Traffic(core, adapters, 200 + repeat)
            own_saturation = closed_loop(own, ids, 4 * sizes.num_clients, sizes.num_requests // 10)
            open_loop(Traffic(core, adapters, 100 + repeat), ids, rate, max(10, sizes.num_requests // 20))
            traffic, counts, use = Traffic(core, adapters, repeat), Counts(core), CoreUse()
            result = open_loop(traffic, ids, rate, sizes.num_requests)
            few_per_s = result.completed_per_s if few_per_s is None else few_per_s
            p50, p99 = np.quantile(traffic.first_token_ms, (0.5, 0.99)).round(1).tolist()
            row = {
                "repeat": repeat,
                "num_adapters": len(adapters),
                "num_host_adapters": sizes.num_host_adapters,
                "num_device_adapters": sizes.num_device_adapters,
                "num_requests": sizes.num_requests,
                "saturation_requests_per_s": round(saturation, 1),
                "own_saturation_requests_per_s": round(own_saturation, 1),
                "arrivals_per_s": round(rate, 1),
                "completed_requests_per_s": round(result.completed_per_s, 1),
                # None is completed before the last arrival where a short run is held up: no share of that.
                "of_few_adapters": round(result.completed_per_s / few_per_s, 4) if few_per_s else None,
                "live_at_middle": result.live_at_middle,
                "live_at_end": result.live_at_end,
                "ttft_p50_ms": p50,
                "ttft_p99_ms": p99,
                **counts.figures(),
                "cores_used_by_others": use.by_others(),
            }
            rows.append(row)
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="a few requests; no rows")
    parser.add_argument("--requests", type=int, default=Sizes.num_requests)
    parser.add_argument("--repeats", type=int, default=Sizes.repeats)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--host-adapters", type=int, default=Sizes.num_host_adapters, help="that fit there")
    options = parser.parse_args()
    sizes = Sizes(
        num_host_adapters=options.host_adapters, num_requests=options.requests, repeats=options.repeats
    )
    if options.smallest:
        sizes = SMALLEST
    with tempfile.TemporaryDirectory() as folder:
        core, names = make_engine(Path(folder), sizes, options.rank)
        settle_interpreter()
        rows = bench(core, names, sizes)
        core.close()
    if not options.smallest:
        print(f"appended to {append_rows('many_adapters', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
