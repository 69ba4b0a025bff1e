"""What a step of the scheduler costs from Python: next_plan, an event of NumPy arrays, advance.

The same decoding batches as the rows `decode/*` of benchmarks/cpp/scheduler, so that the difference is the
binding's. `read:yes` also reads what an executor reads of every plan: the block, its layout and some arrays.
A row's times are percentiles over repetitions, each a mean over a life of the batch, in CPU time of the
process's one thread.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import append_rows

from lora_serve.scheduler import ExecutionEvent, ExecutionPlan, NewRequest, Scheduler, SchedulerOptions

PAGE_SIZE = 16
STEPS_PER_LIFE = 256
NUM_BLOCKS = 3  # one more than plans outstanding


class DecodingBatch:
    """Requests that decode from `context` tokens on, replaced by new ones after each life."""

    def __init__(self, num_requests: int, context: int, num_adapters: int, gives_block: bool) -> None:
        self.num_requests = num_requests
        self._num_adapters = num_adapters
        num_pages = num_requests * ((context + 2 * STEPS_PER_LIFE) // PAGE_SIZE + 2)
        self.scheduler = Scheduler(
            SchedulerOptions(
                page_size=PAGE_SIZE,
                num_device_pages=num_pages,
                max_num_seqs=num_requests,
                max_num_batched_tokens=8192,
                max_model_len=context + 2 * STEPS_PER_LIFE,
                padded_batch_sizes=[1, 2, 4, 8, 16, 32, 64, 128],
            )
        )
        size = self.scheduler.plan_block_size
        self._blocks = [np.empty(size, dtype=np.int32) if gives_block else None for _ in range(NUM_BLOCKS)]
        for adapter_id in range(1, num_adapters + 1):
            self.scheduler.open_adapter(adapter_id, digest_seed=0, size_bytes=1)
        rng = np.random.default_rng(0)
        self._prompts = [rng.integers(0, 128_000, context, dtype=np.int32) for _ in range(num_requests)]
        self._next_request_id = 0
        self._num_steps = 0
        self._sampled = np.full(num_requests, 7, dtype=np.int32)
        self._is_finished = np.zeros(num_requests, dtype=np.uint8)
        # Once with one token each, so that from now on every prompt comes from the cache.
        self._add_all(1)
        while self.scheduler.has_work:
            self._step_of_any_kind()

    def start_life(self) -> None:
        """Add all requests and bring them to where they decode."""
        self._add_all(STEPS_PER_LIFE + 64)
        num_decodes = 0
        while num_decodes < 3:
            plan = self._step_of_any_kind()
            num_decodes = num_decodes + 1 if len(plan.token_ids) == self.num_requests else 0

    def end_life(self) -> None:
        """End all requests."""
        for request_id in range(self._next_request_id - self.num_requests, self._next_request_id):
            self.scheduler.abort(request_id)

    def step(self, read: Callable[[ExecutionPlan], object] | None) -> None:
        """What the engine does in a step, without an executor."""
        plan = self._next_plan()
        if read is not None:
            read(plan)
        self.scheduler.advance(
            ExecutionEvent(
                plan_id=plan.plan_id, sampled_token_ids=self._sampled, is_finished=self._is_finished
            )
        )

    def _next_plan(self) -> ExecutionPlan:
        self._num_steps += 1
        return self.scheduler.next_plan(self._num_steps * 10_000, self._blocks[self._num_steps % NUM_BLOCKS])

    def _add_all(self, max_tokens: int) -> None:
        for index, prompt in enumerate(self._prompts):
            adapter_id = 1 + index % self._num_adapters if self._num_adapters else 0
            self.scheduler.add_request(
                NewRequest(
                    request_id=self._next_request_id,
                    adapter_id=adapter_id,
                    prompt_token_ids=prompt,
                    max_tokens=max_tokens,
                )
            )
            self._next_request_id += 1

    def _step_of_any_kind(self) -> ExecutionPlan:
        plan = self._next_plan()
        self.scheduler.advance(
            ExecutionEvent(
                plan_id=plan.plan_id,
                sampled_token_ids=np.where(plan.samples_token == 1, 7, -1),
                is_finished=np.zeros(len(plan.request_ids), dtype=np.uint8),
                loaded_adapter_ids=plan.load_adapter_ids,
            )
        )
        return plan


def read_plan(plan: ExecutionPlan) -> object:
    """Touch what an executor touches."""
    return (
        plan.block,
        plan.layout,
        plan.request_ids,
        plan.samples_token,
        plan.num_scheduled_tokens,
        plan.num_computed_tokens,
        plan.transfer_ids,
        plan.num_adapters,
    )


def measure(
    batch: DecodingBatch, read: Callable[[ExecutionPlan], object] | None, repetitions: int
) -> list[float]:
    """Mean microseconds of a step, one a life."""
    means = []
    for _ in range(repetitions):
        batch.start_life()
        gc.collect()
        start = time.thread_time_ns()
        for _ in range(STEPS_PER_LIFE):
            batch.step(read)
        means.append((time.thread_time_ns() - start) / STEPS_PER_LIFE / 1e3)
        batch.end_life()
    return means


def row_of(name: str, means: list[float]) -> dict[str, object]:
    p20, p50, p80 = (float(np.percentile(means, percent)) for percent in (20, 50, 80))
    return {
        "benchmark": name,
        "p20_us": round(p20, 4),
        "p50_us": round(p50, 4),
        "p80_us": round(p80, 4),
        "p50_us_per_request": "",
        "repetitions": len(means),
        "compiler": f"cpython {sys.version.split()[0]}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="one short run, nothing is written")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    args = parser.parse_args()
    sizes = [(2, 64)] if args.smallest else [(16, 1024), (64, 1024), (64, 16 * 1024), (64, 128 * 1024)]
    repetitions = 1 if args.smallest else args.repetitions
    rows = []
    for num_requests, context in sizes:
        for gives_block in (False, True):
            batch = DecodingBatch(num_requests, context, min(8, num_requests), gives_block)
            for reading, read in (("no", None), ("yes", read_plan)):
                name = f"binding/decode/requests:{num_requests}/context:{context}/adapters:8"
                name += f"/block:{int(gives_block)}/read:{reading}"
                means = measure(batch, read, repetitions)
                rows.append(row_of(name, means))
                print(f"{name:80} {statistics.median(means):8.2f} us", flush=True)
    if not (args.smallest or args.dry_run):
        print(f"appended to {append_rows('scheduler_step', rows)}")


if __name__ == "__main__":
    main()
