"""What loads of adapters cost the step loop: its own time in each step, with and without 50 cold loads.

Eight clients keep the engine decoding. In turn, nothing else happens, or adapters that the engine does not
know are loaded one after the other, each used by one request as soon as it is there; the files lie in the
page cache, so that readers work without a pause. Three devices: `paced`, whose steps only take time, with
adapters of Qwen3-8B's shape; `launching`, the same with 300 small calls of torch in the loop's thread ahead
of each step, as CUDA's executor launches kernels, after each of which it must get the interpreter lock back;
and `cpu_model`, a small model on the cores on which the readers work, too.

The loop's own time is the engine's measure: a step without the wait for the executor. `late` is what that
wait takes beyond the end of the device's step (known of `paced` only). `loop_waits` counts how often the
loop's thread gave up its core while it had work, for the interpreter lock or any other. `load_waits` is the
engine's count of waits for threads that load. `cores_used_by_others` are cores that other processes kept
busy: where they leave none free, the loop's times are theirs, too. The engine logs as in its own process.

Last come the rises: how much more the loop's p99 is with loads than without, each repeat by itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # Before torch is imported: threads as in the engine's own process.
    from lora_serve.engine.process_handle import make_environment

    os.environ.update(make_environment())

import numpy as np
import torch
from bench_adapter_memory import QWEN3_8B
from machine_load import CoreUse
from paced_executor import PacedExecutor
from result_file import append_rows

from lora_serve.common.config import EngineConfig
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.engine_core import EngineCore
from lora_serve.engine.engine_process import settle_interpreter
from lora_serve.engine.loop_log import LoopLogHandler
from lora_serve.engine.messages import EngineRequest
from lora_serve.executor.executor import Executor
from lora_serve.executor.model_executor import ModelExecutor
from lora_serve.testing.adapters import make_random_adapter
from lora_serve.testing.models import make_random_model

NUM_CLIENTS = 8
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 128
CALLS_PER_STEP = 300  # about what a prefill in pieces of graphs needs
NUM_FOLDERS = 5
LOADS_A_PHASE = 5
ADAPTERS_ON_DEVICE = 6
ADAPTERS_ON_HOST = 12


def num_waits() -> int:
    """How often this thread has given up its core of itself."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class LoopUnderTest:
    """An engine that clients keep busy, stepped here, and what its loop waited for."""

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        self.core = EngineCore(config, executor)
        self.num_loop_waits = 0
        self.step_ms: list[float] = []
        self._collect = executor.collect
        self._num_collect_waits = 0
        self._next_id = 0
        self._names: dict[int, str | None] = {}  # of live requests
        executor.collect = self._watched_collect
        for _ in range(NUM_CLIENTS):
            self.add(None, OUTPUT_TOKENS)

    def add(self, name: str | None, output_tokens: int) -> int:
        request_id, self._next_id = self._next_id, self._next_id + 1
        prompt = np.random.default_rng(request_id).integers(0, 200, PROMPT_TOKENS).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        self.core.add_request(
            EngineRequest(
                request_id=request_id, prompt_token_ids=prompt, sampling_params=params, lora_name=name
            )
        )
        self._names[request_id] = name
        return request_id

    def is_live(self, request_id: int) -> bool:
        return request_id in self._names

    def step(self) -> None:
        self._num_collect_waits = 0
        before, begin = num_waits(), time.perf_counter()
        outputs = self.core.step()
        self.step_ms.append((time.perf_counter() - begin) * 1e3)
        self.num_loop_waits += num_waits() - before - self._num_collect_waits
        if self.core.failure is not None:
            raise RuntimeError(self.core.failure)
        for output in outputs:
            if output.error is not None:
                raise output.error.to_exception()
            if output.finish_reason is not None and self._names.pop(output.request_id) is None:
                self.add(None, OUTPUT_TOKENS)

    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()

    def _watched_collect(self) -> object:
        before = num_waits()
        result = self._collect()
        self._num_collect_waits = num_waits() - before
        return result


@dataclass(frozen=True)
class Device:
    """What runs the steps: a configuration, its executor, and adapters that fit its model."""

    name: str
    config: EngineConfig
    executor: Executor
    folders: list[Path]
    adapter_bytes: int


def make_adapters(folder: Path, config: dict[str, object], num_folders: int, **options: object) -> list[Path]:
    paths = [folder / f"adapter-{index}" for index in range(num_folders)]
    for seed, path in enumerate(paths):
        make_random_adapter(path, config, seed=seed, **options)
    return paths


def bytes_of(path: Path) -> int:
    return (path / "adapter_model.safetensors").stat().st_size


def memory_options(adapter_bytes: int) -> dict[str, float]:
    one = (adapter_bytes + 4096) / 2**30
    return {"lora_memory_gb": ADAPTERS_ON_DEVICE * one, "lora_host_memory_gb": ADAPTERS_ON_HOST * one}


def make_paced(folder: Path, is_smallest: bool, name: str = "paced", calls_per_step: int = 0) -> Device:
    model_config = dict(QWEN3_8B)
    if is_smallest:
        model_config.update(num_hidden_layers=2, hidden_size=256, intermediate_size=512, vocab_size=512)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model_config), encoding="utf-8")
    paths = make_adapters(
        folder, model_config, 1 if is_smallest else NUM_FOLDERS, rank=16, dtype=torch.bfloat16
    )
    config = EngineConfig(
        model=str(folder), num_device_pages=1024, max_model_len=1024, **memory_options(bytes_of(paths[0]))
    )
    executor = PacedExecutor(
        folder,
        num_device_pages=1024,
        max_model_len=1024,
        step_ms=8.0,
        max_lora_rank=config.max_lora_rank,
        memory_bytes=int(config.lora_memory_gb * 2**30),
        host_memory_bytes=int(config.lora_host_memory_gb * 2**30),
        calls_per_step=calls_per_step,
    )
    return Device(name, config, executor, paths, bytes_of(paths[0]))


def make_launching(folder: Path, is_smallest: bool) -> Device:
    return make_paced(folder, is_smallest, "launching", CALLS_PER_STEP)


def make_cpu_model(folder: Path, is_smallest: bool) -> Device:
    num_layers, lora_rank = (2, 16) if is_smallest else (8, 256)
    width = 64 if is_smallest else 256
    make_random_model(
        folder,
        "Qwen3ForCausalLM",
        num_layers=num_layers,
        hidden_size=width,
        intermediate_size=width,
        num_heads=4,
        num_kv_heads=4,
        head_dim=width // 4,
    )
    model_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    paths = make_adapters(folder, model_config, 1 if is_smallest else NUM_FOLDERS, rank=lora_rank)
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        num_device_pages=1024,
        max_model_len=1024,
        max_lora_rank=lora_rank,
        **memory_options(bytes_of(paths[0])),
    )
    return Device("cpu_model", config, ModelExecutor(config), paths, bytes_of(paths[0]))


def load_one_after_another(loop: LoopUnderTest, folders: list[Path], num_loads: int, prefix: str) -> None:
    """Load adapters under new names, and let one request use each before the next load begins."""
    for index in range(num_loads):
        name = f"{prefix}-{index}"
        load = loop.core.load_adapter(name, str(folders[index % len(folders)]))
        while not load.done():
            loop.step()
        load.result()
        request_id = loop.add(name, 2)
        while loop.is_live(request_id):
            loop.step()


class Figures:
    """What the loop took and waited for in all phases of one kind."""

    def __init__(self, loop: LoopUnderTest, executor: Executor) -> None:
        self._loop = loop
        self._late_ms: list[float] = getattr(executor, "late_ms", [])
        self.num_steps = 0
        self._own_ms: list[float] = []
        self._all_late_ms: list[float] = []
        self._step_ms: list[float] = []
        self._num_loop_waits = self._num_load_waits = 0
        self._wall_s = self._others_s = 0.0

    def measure(self, run: Callable[[], object]) -> None:
        """Add a phase, of fewer steps than the engine remembers."""
        loop = self._loop
        self._late_ms.clear()
        loop.core.loop_times.clear()
        loop.step_ms.clear()
        loop_waits, load_waits = loop.num_loop_waits, loop.core.stats().total_load_waits
        begin, use = time.perf_counter(), CoreUse()
        run()
        self._others_s += use.others_s()
        self._wall_s += time.perf_counter() - begin
        self.num_steps += len(loop.step_ms)
        self._own_ms += (loop.core.loop_times.recent_us() / 1e3).tolist()
        self._all_late_ms += self._late_ms
        self._step_ms += loop.step_ms
        self._num_loop_waits += loop.num_loop_waits - loop_waits
        self._num_load_waits += loop.core.stats().total_load_waits - load_waits

    def row(self) -> dict[str, object]:
        row: dict[str, object] = {"num_steps": self.num_steps}
        for name, times in (("own", self._own_ms), ("late", self._all_late_ms), ("step", self._step_ms)):
            values = np.quantile(times, (0.5, 0.99, 1.0)).round(3).tolist() if times else ("", "", "")
            row |= zip((f"{name}_p50_ms", f"{name}_p99_ms", f"{name}_max_ms"), values, strict=True)
        return row | {
            "loop_waits_per_1000_steps": round(1e3 * self._num_loop_waits / self.num_steps, 1),
            "load_waits": self._num_load_waits,
            "cores_used_by_others": round(self._others_s / self._wall_s, 2),
        }


def bench(device: Device, num_loads: int, repeats: int) -> list[dict[str, object]]:
    """Phases with and without loads in turn, so that both see the same of whatever else runs."""
    loop = LoopUnderTest(device.config, device.executor)
    rows: list[dict[str, object]] = []
    load_one_after_another(loop, device.folders, min(num_loads, 3), "warm-up")
    settle_interpreter()
    for repeat in range(repeats):
        none, loads = Figures(loop, device.executor), Figures(loop, device.executor)
        for first in range(0, num_loads, LOADS_A_PHASE):
            loads.measure(
                partial(load_one_after_another, loop, device.folders, LOADS_A_PHASE, f"{repeat}-{first}")
            )
            none.measure(partial(loop.steps, loads.num_steps - none.num_steps))
        for workload, figures in (("no loads", none), (f"{num_loads} cold loads", loads)):
            row = {
                "device": device.name,
                "workload": workload,
                "repeat": repeat,
                "adapter_bytes": device.adapter_bytes,
                **figures.row(),
            }
            rows.append(row)
            print(*(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)
    loop.core.close()
    return rows


def describe_rises(rows: list[dict[str, object]]) -> list[str]:
    """One line a repeat: the loop's p99 with loads less that without."""
    p99s = {(row["device"], row["repeat"], row["workload"]): float(str(row["own_p99_ms"])) for row in rows}
    return [
        f"device={device} repeat={repeat} rise_of_own_p99_ms={p99 - p99s[device, repeat, 'no loads']:.3f}"
        for (device, repeat, workload), p99 in p99s.items()
        if workload != "no loads"
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="few loads of small adapters; no rows")
    parser.add_argument("--no-rows", action="store_true", help="print only; then no git is needed")
    parser.add_argument("--loads", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    makers = {"paced": make_paced, "launching": make_launching, "cpu_model": make_cpu_model}
    parser.add_argument("--devices", nargs="+", choices=list(makers), default=list(makers))
    options = parser.parse_args()
    num_loads, repeats = (LOADS_A_PHASE, 1) if options.smallest else (options.loads, options.repeats)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryFile("w+") as log:
        handler = LoopLogHandler(log, "%(asctime)s %(levelname)s engine[%(process)d] %(name)s: %(message)s")
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        for name in options.devices:
            with tempfile.TemporaryDirectory() as folder:
                rows += bench(makers[name](Path(folder) / name, options.smallest), num_loads, repeats)
        logging.shutdown()
    print(*describe_rises(rows), sep="\n")
    if not options.smallest and not options.no_rows:
        print(f"appended to {append_rows('load_stall', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
