"""What the host tier of the KV pages is worth to conversations that come back, and what it costs others.

More conversations than the device's pages hold: three times as many, of about 4,000 tokens each. First one
turn of each, then rounds in which each comes back once, in random order, with all that was said and 64 tokens
more. The same with the host tier, which holds all of them, and without it. Turns come one after the other.

Then some requests decode meanwhile, and the times between their tokens are taken: alone; beside turns of
conversations that are on the device; beside turns that are loaded back from the host (or computed again,
without the tier). The last two differ in nothing but the load-backs, which no step may wait for.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from conversations import Conversation, Traffic, Turn
from load_back_times import LoadBackTimes

from lora_serve.cli.bench.bench_engine import BenchEngine
from lora_serve.common.config import EngineConfig
from lora_serve.executor.kv_tensors import page_num_bytes
from lora_serve.models.config import read_model_config
from lora_serve.models.shapes import write_model_shape
from lora_serve.testing.models import make_random_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import append_rows

Row = dict[str, object]
_PAGE_SIZE = 16
_GIB = 2**30
TINY_DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"  # FlashInfer wants 16 bits.
_TURN_CELLS = (
    *("num_turns", "ttft_p50_ms", "ttft_p99_ms", "ttft_mean_ms"),
    *("history_tokens", "cached_tokens", "host_hit_tokens", "recomputed_tokens"),
    *("load_backs", "load_back_gb_per_s", "plain_gb_per_s"),
)
_DECODE_CELLS = ("itl_p50_ms", "itl_p99_ms", "itl_max_ms", "num_tokens_timed", "steps")


@dataclass(frozen=True)
class Sizes:
    """How large a run is. A third of the conversations fits on the device."""

    num_conversations: int = 18
    num_first_tokens: int = 4000
    num_new_tokens: int = 64
    num_output_tokens: int = 16
    num_rounds: int = 3
    num_decodes: int = 8
    num_decode_tokens: int = 512
    num_turns_beside: int = 16
    num_on_device: int = 2
    alone_s: float = 2.0
    max_num_batched_tokens: int = 8192

    @property
    def max_model_len(self) -> int:
        return self._num_pages(self.num_rounds + 2 + self.num_turns_beside) * _PAGE_SIZE

    @property
    def num_device_pages(self) -> int:
        return -(-self.num_conversations // 3) * self._num_pages(self.num_rounds + 2)

    @property
    def num_host_pages(self) -> int:
        # Beside the conversations, the pages of decodes, of turns beside them and of the warm-up go there.
        num_conversation_pages = self.num_conversations * self._num_pages(self.num_rounds + 2)
        num_decode_pages = (
            4 * self.num_decodes * self._num_pages(0, self.num_new_tokens + self.num_decode_tokens)
        )
        return num_conversation_pages + num_decode_pages + 2 * self.max_model_len // _PAGE_SIZE

    def _num_pages(self, num_returns: int, num_first_tokens: int | None = None) -> int:
        first = self.num_first_tokens if num_first_tokens is None else num_first_tokens
        return -(-(first + num_returns * (self.num_new_tokens + self.num_output_tokens)) // _PAGE_SIZE)


SMALLEST = Sizes(
    num_conversations=12,
    num_first_tokens=80,
    num_new_tokens=8,
    num_output_tokens=4,
    num_rounds=1,
    num_decodes=2,
    num_decode_tokens=100,
    num_turns_beside=2,
    num_on_device=1,
    alone_s=0.02,
    max_num_batched_tokens=64,
)


class HostTierBench:
    """One engine, with or without a host tier, and the rows of what it is made to do.

    Parameters
    ----------
    engine
        Just started.
    sizes
        How large the run is.
    """

    def __init__(self, engine: BenchEngine, sizes: Sizes) -> None:
        self._engine, self._sizes = engine, sizes
        self._has_tier = engine.core.model_info.num_host_pages > 0
        self._load_backs = LoadBackTimes(engine.core) if self._has_tier else None
        self._traffic = Traffic(engine, seed=1)
        self._order = np.random.default_rng(2)
        self._conversations = [Conversation() for _ in range(sizes.num_conversations)]
        self.rows: list[Row] = []

    def run(self) -> None:
        """Everything; in this order, as one leaves the pages for the next."""
        sizes = self._sizes
        self._warm_up()
        first = [self._turn(one, sizes.num_first_tokens) for one in self._conversations]
        self._add_row("first turns", first)
        self._return_all(1)  # Not counted: the order of pages is then that of a long run.
        self._begin()
        self._add_row("returning turns", self._return_all(sizes.num_rounds))
        self._time_decodes("decodes alone", [])
        newest = self._conversations[: sizes.num_on_device]
        for one in newest:
            self._turn(one, sizes.num_new_tokens)
        here = [newest[index % len(newest)] for index in range(sizes.num_turns_beside)]
        self._time_decodes("decodes beside turns from the device", here)
        # Each time the one that was away longest, which is not on the device any more.
        others = sorted(self._conversations[sizes.num_on_device :], key=lambda one: one.last_turn)
        away = [others[index % len(others)] for index in range(sizes.num_turns_beside)]
        where = "from the host" if self._has_tier else "computed again"
        self._time_decodes(f"decodes beside turns {where}", away)

    def _warm_up(self) -> None:
        """Every kind of step once: kernels are compiled and chosen at their first use."""
        sizes = self._sizes
        one, beside = Conversation(), sizes.num_decodes > 0
        self._turn(one, sizes.num_first_tokens)
        for _ in range(2):
            self._turn(one, sizes.num_new_tokens)
        if beside:
            self._traffic.start_decodes(sizes.num_decodes, sizes.num_new_tokens, sizes.num_decode_tokens)
            self._turn(one, sizes.num_new_tokens)
            self._turn(Conversation(), sizes.num_first_tokens)
            self._traffic.stop_decodes()

    def _turn(self, conversation: Conversation, num_new_tokens: int) -> Turn:
        return self._traffic.take_turn(conversation, num_new_tokens, self._sizes.num_output_tokens)

    def _return_all(self, num_rounds: int) -> list[Turn]:
        return [
            self._turn(self._conversations[index], self._sizes.num_new_tokens)
            for _ in range(num_rounds)
            for index in self._order.permutation(len(self._conversations)).tolist()
        ]

    def _time_decodes(self, workload: str, conversations: list[Conversation]) -> None:
        """Times between the tokens of requests that decode, while these conversations come back."""
        sizes = self._sizes
        self._begin()
        self._traffic.start_decodes(sizes.num_decodes, sizes.num_new_tokens, sizes.num_decode_tokens)
        turns = [self._turn(one, sizes.num_new_tokens) for one in conversations]
        end = time.perf_counter() + sizes.alone_s
        while not conversations and time.perf_counter() < end:
            self._traffic.step()
        self._add_row(workload, turns, self._traffic.stop_decodes())

    def _begin(self) -> None:
        self._traffic.settle()
        stats = self._engine.core.stats()
        self._host_hits, self._steps = stats.total_host_hit_tokens, stats.total_steps
        if self._load_backs is not None:
            self._load_backs.clear()

    def _add_row(self, workload: str, turns: list[Turn], itl_ms: list[float] | None = None) -> None:
        self._traffic.settle()
        stats, info = self._engine.core.stats(), self._engine.core.model_info
        row: Row = {
            "workload": workload,
            "host_tier": "on" if self._has_tier else "off",
            "num_conversations": len(self._conversations),
            "num_device_pages": info.num_device_pages,
            "num_host_pages": info.num_host_pages,
            **dict.fromkeys((*_TURN_CELLS, *_DECODE_CELLS), ""),
        }
        if turns:
            ttft_ms = [turn.ttft_ms for turn in turns]
            row["num_turns"] = len(turns)
            row["ttft_p50_ms"], row["ttft_p99_ms"] = np.quantile(ttft_ms, (0.5, 0.99)).round(2).tolist()
            row["ttft_mean_ms"] = round(float(np.mean(ttft_ms)), 2)
            row["history_tokens"] = sum(turn.num_history_tokens for turn in turns)
            row["cached_tokens"] = sum(turn.num_cached_tokens for turn in turns)
            row["recomputed_tokens"] = sum(turn.num_recomputed_tokens for turn in turns)
        if workload != "first turns":
            row["host_hit_tokens"] = stats.total_host_hit_tokens - self._host_hits
            row["steps"] = stats.total_steps - self._steps
        if turns and self._load_backs is not None and self._load_backs.num_load_backs:
            row["load_backs"] = self._load_backs.num_load_backs
            row["load_back_gb_per_s"] = round(self._load_backs.gb_per_s(), 2)
            row["plain_gb_per_s"] = round(self._load_backs.plain_gb_per_s(), 2)
        if itl_ms:
            quantiles = np.quantile(itl_ms, (0.5, 0.99, 1.0)).round(2).tolist()
            row["itl_p50_ms"], row["itl_p99_ms"], row["itl_max_ms"] = quantiles
            row["num_tokens_timed"] = len(itl_ms)
        print(*(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)
        self.rows.append(row)


def bench(config: EngineConfig, sizes: Sizes) -> list[Row]:
    """Rows of one engine."""
    begin = time.perf_counter()
    engine = BenchEngine(config, [])
    try:
        one = HostTierBench(engine, sizes)
        one.run()
        print(f"host_tier_gb={config.kv_host_memory_gb:.2f} start_s={engine.start_s:.1f}", end=" ")
        print(f"all_s={time.perf_counter() - begin:.1f}", flush=True)
        return one.rows
    finally:
        engine.close()


def make_config(model: Path, sizes: Sizes, host_memory_gb: float, *, is_dummy: bool) -> EngineConfig:
    """An engine of which everything but the host tier is the same."""
    has_cuda = torch.cuda.is_available()
    max_num_seqs = max(8, sizes.num_decodes + 2)
    return EngineConfig(
        model=str(model),
        load_format="dummy" if is_dummy else "auto",
        device="cuda" if has_cuda else "cpu",
        page_size=_PAGE_SIZE,
        num_device_pages=sizes.num_device_pages,
        kv_host_memory_gb=host_memory_gb,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
        lora_memory_gb=1 / 64,
        lora_host_memory_gb=1 / 64,
        cuda_graph_sizes=[1, 2, 4, 8, max_num_seqs],
    )


def compare(rows: list[Row]) -> dict[str, float]:
    """What the host tier changes: times without it over times with it, and ITL beside load-backs."""

    def cell(workload: str, tier: str, name: str) -> float:
        (row,) = (r for r in rows if str(r["workload"]).startswith(workload) and r["host_tier"] == tier)
        return float(str(row[name] or "nan"))

    beside = "decodes beside turns from the device", "on"
    loaded = "decodes beside turns from the host", "on"
    found = {
        f"ttft_{part}_off_over_on": cell("returning turns", "off", f"ttft_{part}_ms")
        / cell("returning turns", "on", f"ttft_{part}_ms")
        for part in ("p50", "p99", "mean")
    }
    found["load_back_share_of_plain"] = cell("returning turns", "on", "load_back_gb_per_s") / cell(
        "returning turns", "on", "plain_gb_per_s"
    )
    found["itl_p50_rise_by_load_backs_ms"] = cell(*loaded, "itl_p50_ms") - cell(*beside, "itl_p50_ms")
    found["itl_p99_rise_by_load_backs_ms"] = cell(*loaded, "itl_p99_ms") - cell(*beside, "itl_p99_ms")
    return {name: round(value, 3) for name, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="a tiny model and short turns; no rows")
    parser.add_argument("--model-shape", default="qwen3-8b", metavar="NAME")
    parser.add_argument("--conversations", type=int, default=Sizes.num_conversations, metavar="N")
    parser.add_argument("--rounds", type=int, default=Sizes.num_rounds, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the rows and the comparison there as well")
    parser.add_argument("--dry-run", action="store_true", help="append no rows; then no git is needed")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    sizes = SMALLEST
    if not options.smallest:
        sizes = Sizes(num_conversations=options.conversations, num_rounds=options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        if options.smallest:
            make_random_model(path, "Qwen3ForCausalLM", dtype=TINY_DTYPE)
        else:
            write_model_shape(options.model_shape, path)
        page_bytes = page_num_bytes(read_model_config(path), _PAGE_SIZE)
        rows: list[Row] = []
        for num_host_pages in (sizes.num_host_pages, 0):
            host_memory_gb = num_host_pages * page_bytes / _GIB
            config = make_config(path, sizes, host_memory_gb, is_dummy=not options.smallest)
            rows += bench(config, sizes)
    comparison = compare(rows)
    print(json.dumps(comparison), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows, **comparison}, indent=1), encoding="utf-8")
    if not (options.smallest or options.dry_run):
        print(f"appended to {append_rows('kv_host_tier', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
