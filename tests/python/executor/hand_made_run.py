"""Runs one request on an executor with hand-made plans: chosen chunks, pages and recomputation."""

from __future__ import annotations

from itertools import count

from lora_serve.executor.executor import ExecutionResult
from lora_serve.executor.sampling_state import SamplingState

from .plans import PlanStandIn
from .run_plan import run_plan


class HandMadeRun:
    """A request in page-table row `row`, on the pages given, as the scheduler would run it."""

    def __init__(self, executor, state: SamplingState, pages: list[int], *, row: int = 0, slot: int = -1):
        self.executor, self.state, self.row, self.slot = executor, state, row, slot
        self.computed = 0
        self._pages = pages
        self._has_pages = False
        self._plan_ids = count(1)

    @property
    def tokens(self) -> list[int]:
        return [*self.state.prompt_token_ids.tolist(), *self.state.output_token_ids]

    def preempt(self, pages: list[int], num_kept: int = 0) -> None:
        """Go on elsewhere; the first `num_kept` tokens must already be in the new pages."""
        self._pages, self._has_pages, self.computed = pages, False, num_kept

    def plan(self, num_tokens: int) -> PlanStandIn:
        end = self.computed + num_tokens
        return PlanStandIn(
            plan_id=next(self._plan_ids),
            rows=[
                {
                    "page_table_row": self.row,
                    "num_computed_tokens": self.computed,
                    "num_scheduled_tokens": num_tokens,
                    "adapter_slot": self.slot,
                    "samples_token": int(end == len(self.tokens)),
                }
            ],
            tokens=self.tokens[self.computed : end],
            deltas=[] if self._has_pages else [(self.row, 0, self._pages)],
        )

    def step(self, num_tokens: int) -> ExecutionResult:
        """Compute the next `num_tokens` tokens; samples when they are the last known ones."""
        plan = self.plan(num_tokens)
        result = run_plan(self.executor, plan, [self.state])
        self._has_pages = True
        self.computed += num_tokens
        return result

    def finish(self, chunks: list[int], num_output: int) -> list[ExecutionResult]:
        """Prefill in chunks, then decode until there are `num_output` tokens."""
        results = [self.step(num_tokens) for num_tokens in chunks]
        while len(self.state.output_token_ids) < num_output:
            results.append(self.step(1))
        return results
