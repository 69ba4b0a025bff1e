"""Minutes at full load, and then: does anything grow, is anything left, is any answer wrong?

    python scripts/soak_cuda.py                    Qwen3-8B's shape, 7 minutes, on the CUDA device
    python scripts/soak_cuda.py --smallest         a tiny model, some seconds, also without CUDA

More clients than may run each ask again as soon as they are answered: prompts and answers of random length,
new ones and follow-ups, greedy and sampled, some aborted. Adapters of several ranks, more than the device or
the host holds, are loaded, replaced, unloaded, with and without force. KV pages are too few, so requests are
preempted, and pages go to the host tier and come back. All in this process, with the interpreter set up as in
the engine's own.

Then everything is drained. It has failed (exit status 1) if a request or a change of adapters failed, if
memory, threads or open files have grown since the warm-up, if a count is not back to zero, or if one of some
greedy answers is not what the model gives in one go. The last line is a summary in JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

_BEGIN = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

from lora_serve.cli.bench.generated_adapters import GeneratedAdapters  # noqa: E402
from lora_serve.common.config import EngineConfig  # noqa: E402
from lora_serve.common.errors import LoraServeError  # noqa: E402
from lora_serve.engine.engine_core import EngineCore  # noqa: E402
from lora_serve.engine.engine_process import settle_interpreter  # noqa: E402
from lora_serve.engine.status import EngineStats  # noqa: E402
from soak.adapter_changes import AdapterChanges  # noqa: E402
from soak.answers import AnswerSample  # noqa: E402
from soak.clients import Clients  # noqa: E402
from soak.memory import MemoryRecord, find_growth  # noqa: E402
from soak.sizes import SMALLEST, SoakSizes, make_config, make_contents, make_model, model_dtype  # noqa: E402

_DRAIN_LIMIT_S = 60.0
_MORE_S = 60.0
"""How much longer than asked for the load lasts at most, where something has not happened yet."""
_MUST_BE_ZERO = (
    *("num_waiting_requests", "num_running_requests", "num_preempted_requests"),
    *("num_queued_requests", "num_queued_tokens", "num_private_pages", "num_transfers"),
    *("num_adapters", "num_resident_adapters", "num_adapters_being_read", "num_adapter_bytes"),
    *("num_adapters_in_line", "num_paused_adapters"),
)
_MUST_HAVE_HAPPENED = (
    *("total_adapter_loads", "total_adapter_evictions", "total_preemptions", "total_evicted_pages"),
    *("total_hit_tokens", "total_host_hit_tokens", "total_aborted_requests"),
)


class Soak:
    """One engine under load.

    Parameters
    ----------
    core
        Just started.
    sizes
        How much load.
    contents
        Directories of each adapter.
    seed
        Of all choices.
    record
        Samples go there, a line each.
    """

    def __init__(
        self,
        core: EngineCore,
        sizes: SoakSizes,
        contents: dict[str, list[Path]],
        seed: int,
        record: TextIO,
    ) -> None:
        self._core, self._sizes, self._record = core, sizes, record
        self._answers = AnswerSample(sizes.num_checked_answers, seed)
        self._memory = MemoryRecord(core.config.device)
        self._clients = Clients(
            core, sizes, names=lambda: self._changes.serving, on_answer=self._answers.offer, seed=seed
        )
        self._changes = AdapterChanges(
            core,
            contents,
            interval_s=sizes.change_interval_s,
            seed=seed,
            expect_aborts=self._clients.expect_aborts,
        )
        self._problems: list[str] = []

    def run(self, seconds: float, warm_up_s: float) -> dict[str, Any]:
        """Load for so many seconds, drain, check; give the summary."""
        begin = time.perf_counter()
        self._load(begin, seconds)
        load_s, num_output_tokens = time.perf_counter() - begin, self._clients.counts["output tokens"]
        drain_s = self._drain()
        growth = self._memory.growth(warm_up_s)
        self._problems += find_growth(growth)
        found: dict[str, Any] = {"drain_s": round(drain_s, 1)}
        try:
            stats = self._core.stats()
            found["stats"] = {
                name: getattr(stats, name) for name in stats.__struct_fields__ if "total" in name
            }
            self._check_counts(stats)
            found["checked"] = self._check_answers()
            self._check_counts(self._core.stats())
        except (LoraServeError, RuntimeError) as error:
            self._problems.append(f"{type(error).__name__}: {error}")
        self._problems += self._clients.problems + self._changes.problems
        return {
            "seconds": round(load_s, 1),
            "warm_up_s": warm_up_s,
            "output_tokens_per_s": round(num_output_tokens / load_s, 1),
            "requests": self._clients.counts,
            "changes": self._changes.counts,
            **found,
            "memory": growth,
            "problems": self._problems,
        }

    def _load(self, begin: float, seconds: float) -> None:
        self._changes.load_all()
        next_sample_at = 0.0
        while self._core.failure is None:
            at = time.perf_counter() - begin
            if at >= seconds and (self._has_tried_everything() or at >= seconds + _MORE_S):
                break
            self._clients.fill()
            self._clients.abort_some_waiting()
            self._changes.tick(at)
            self._clients.step()
            if at >= next_sample_at:
                next_sample_at = at + self._sizes.sample_interval_s
                self._sample(at)

    def _has_tried_everything(self) -> bool:
        """Whether there was some of everything; on a slow machine that may take longer than asked for."""
        stats = self._core.stats()
        return (
            self._clients.counts["answered"] >= self._sizes.least_answers
            and all(self._changes.counts.values())
            and all(getattr(stats, name) for name in _MUST_HAVE_HAPPENED)
        )

    def _drain(self) -> float:
        """Until no request, no adapter and no copy is left; seconds that it took."""
        begin = time.perf_counter()

        def goes_on() -> bool:
            if self._core.failure is not None or time.perf_counter() - begin > _DRAIN_LIMIT_S:
                return False
            has_some = self._clients.num_live or self._changes.num_pending or self._core.has_work
            return bool(has_some or self._core.stats().num_transfers)

        for unloads in (False, True):
            if unloads:
                self._changes.unload_all()
            while goes_on():
                self._clients.step()
                self._changes.tick(0.0, may_change=False)
        self._core.settle()
        return time.perf_counter() - begin

    def _check_answers(self) -> dict[str, Any]:
        answers = self._answers.check(self._core, self._changes.path_of_digest, model_dtype())
        checked = dataclasses.asdict(answers)
        self._problems += checked.pop("problems")
        self._drain()
        return checked

    def _check_counts(self, stats: EngineStats) -> None:
        for name in _MUST_BE_ZERO:
            if getattr(stats, name) != 0:
                self._problems.append(f"{name} is {getattr(stats, name)} after the drain")
        if self._clients.num_live:
            self._problems.append(f"{self._clients.num_live} requests had no last output")
        if stats.num_free_pages + stats.num_tree_pages != stats.num_device_pages:
            self._problems.append(
                f"{stats.num_free_pages} free pages and {stats.num_tree_pages} in the tree are not all "
                f"{stats.num_device_pages}"
            )
        for name in _MUST_HAVE_HAPPENED:
            if getattr(stats, name) == 0:
                self._problems.append(f"{name} is 0: the load does not try what it should")

    def _sample(self, at_s: float) -> None:
        sample: dict[str, Any] = dict(self._memory.sample(at_s))
        if self._core.failure is None:
            stats = self._core.stats()
            sample |= {name: getattr(stats, name) for name in stats.__struct_fields__}
        sample |= {"live_requests": self._clients.num_live, **self._clients.counts}
        self._record.write(json.dumps(sample) + "\n")
        self._record.flush()
        shown = ("host_rss", "device_in_use", "torch_reserved", "torch_allocated")
        sizes = " ".join(f"{name}={sample[name] / 2**20:.1f}M" for name in shown if name in sample)
        counts = ("num_running_requests", "num_waiting_requests", "num_resident_adapters", "answered")
        numbers = " ".join(f"{name}={sample.get(name)}" for name in counts)
        print(f"{at_s:7.1f} s {sizes} {numbers}", flush=True)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smallest", action="store_true", help="a tiny model; 4 seconds by default")
    parser.add_argument("--seconds", type=float, help="at full load (default: 420)")
    parser.add_argument("--warm-up-s", type=float, help="before memory counts (default: a quarter of it)")
    parser.add_argument("--model-shape", default="qwen3-8b", metavar="NAME")
    parser.add_argument("--scratch", metavar="FOLDER", help="where adapters are generated: 6 GB for qwen3-8b")
    parser.add_argument("--record", metavar="FILE", help="write the samples there, a line of JSON each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 4.0 if options.smallest else 420.0
    if options.warm_up_s is None:
        options.warm_up_s = options.seconds / 4
    return options


def start(config: EngineConfig) -> tuple[EngineCore, float]:
    """The engine, and the seconds that its start took."""
    begin = time.perf_counter()
    core = EngineCore(config)
    settle_interpreter()
    return core, time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sizes = SMALLEST if options.smallest else SoakSizes()
    folder = Path(tempfile.mkdtemp(prefix="lora-serve-soak-", dir=options.scratch))
    try:
        model = make_model(sizes, options.model_shape, folder / "model")
        adapters = GeneratedAdapters(folder, str(model), "auto")
        contents = make_contents(sizes, adapters)
        print(f"wrote {2 * len(contents)} adapters at {time.perf_counter() - _BEGIN:.1f} s", flush=True)
        core, start_s = start(make_config(sizes, model, adapters))
        # From here on a line for each change of an adapter would hide the rest.
        logging.getLogger("lora_serve").setLevel(logging.WARNING)
        try:
            with open(options.record or os.devnull, "w", encoding="utf-8") as record:
                soak = Soak(core, sizes, contents, options.seed, record)
                summary = soak.run(options.seconds, options.warm_up_s)
        finally:
            core.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"start_s": round(start_s, 1), **summary}), flush=True)
    for problem in summary["problems"]:
        print(f"PROBLEM {problem}", file=sys.stderr)
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
