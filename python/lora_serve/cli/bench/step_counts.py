"""What an engine's steps were made of while something was measured."""

from __future__ import annotations

import time

from lora_serve.engine.engine_core import EngineCore

Counts = dict[str, int | float]


class StepCounts:
    """What the engine counts from the construction on.

    Parameters
    ----------
    core
        The engine; its loop times are cleared.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        core.loop_times.clear()
        self._before = self._read()
        self._begin = time.perf_counter()

    def figures(self) -> Counts:
        """Steps, what one takes and holds, what the loop itself takes of it, and what was loaded."""
        took_s = time.perf_counter() - self._begin
        counts = {name: count - self._before[name] for name, count in self._read().items()}
        steps = max(1, counts["steps"])
        times = self._core.loop_times.quantiles()
        return {
            "steps": counts["steps"],
            "ms_per_step": round(took_s / steps * 1e3, 3),
            "loop_p50_us": times.p50_us,
            "loop_p99_us": times.p99_us,
            "loop_max_us": times.max_us,
            "rows_per_step": round(counts["rows"] / steps, 1),
            "prefill_tokens": counts["prefill_tokens"],
            "adapters_per_step": round(counts["adapters"] / steps, 1),
            "preemptions": counts["preemptions"],
            "loads_to_device": counts["loads"],
            "adapter_pauses": counts["pauses"],
            "reads_from_disk": counts["reads"],
        }

    def _read(self) -> dict[str, int]:
        stats = self._core.stats()
        return {
            "steps": stats.total_steps,
            "rows": stats.total_decode_rows + stats.total_prefill_rows,
            "prefill_tokens": stats.total_prefill_tokens,
            "adapters": stats.total_step_adapters,
            "preemptions": stats.total_preemptions,
            "loads": stats.total_adapter_loads,
            "pauses": stats.total_adapter_pauses,
            "reads": sum(info.total_reads for info in self._core.adapters()),
        }
