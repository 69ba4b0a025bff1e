"""What the bench commands share: a model, its adapters, one engine at a time, and how to measure on it."""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_serve.cli.bench import options
from lora_serve.cli.bench.bench_engine import BenchEngine, free_memory
from lora_serve.cli.bench.closed_batch import best_closed_batch
from lora_serve.cli.bench.generated_adapters import GeneratedAdapters
from lora_serve.cli.bench.machine import describe_machine
from lora_serve.cli.bench.open_loop import run_open_loop
from lora_serve.cli.bench.rows import EngineNeeds
from lora_serve.cli.bench.workloads import ClosedBatch, Workload

logger = logging.getLogger(__name__)

Measured = dict[str, Any]


class Session:
    """One run of a bench command.

    Owns: a folder of generated files, and the engine; both are gone when it is left.

    Parameters
    ----------
    args
        Parsed options of `options.add_arguments`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._given = options.given_options(args)
        self._folder = Path(tempfile.mkdtemp(prefix="lora-serve-bench-", dir=args.scratch))
        try:
            self.model = options.choose_model(args, self._folder)
            dtype = self._given.get("dtype", "auto")
            self._adapters = GeneratedAdapters(self._folder, self.model.path, dtype)
        except BaseException:
            shutil.rmtree(self._folder)
            raise
        self._engine: BenchEngine | None = None
        self._needs: EngineNeeds | None = None
        self._machine: dict[str, str] | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.drop_engine()
            free_memory()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def measure(self, name: str, needs: EngineNeeds, workload: Workload) -> Measured:
        """Measure a workload on an engine, the one of the last call where it needs the same.

        Parameters
        ----------
        name
            Of the files of a profile.

        Returns
        -------
        dict
            'figures' (name to number), 'runs' (tokens/s of each), 'steps' (as `StepCounts` gives them), and
            what it was measured on.
        """
        engine = self._engine_for(needs)
        found: Measured = {"workload": workload.describe(), "engine": needs.describe()}
        if isinstance(workload, ClosedBatch):
            best, runs = best_closed_batch(engine, workload, self._args.repeats)
            found["figures"] = {
                "tokens_per_s": round(best.tokens_per_s, 1),
                "first_token_ms": round(best.first_token_ms, 2),
                "took_ms": round(best.took_ms, 2),
            }
            found["runs"] = [round(run, 1) for run in runs]
            found["steps"] = best.counts
        else:
            result = run_open_loop(engine, workload, self._args.seed_of_arrivals)
            found["figures"], found["steps"] = result.figures, result.counts
        if self._args.profile is not None:
            from lora_serve.cli.bench.profile import profile_workload

            found["profile"] = profile_workload(engine, workload, Path(self._args.profile), name)
        return {
            **found,
            "model": self.model.name,
            "config": self._describe_config(engine),
            "start_s": round(engine.start_s, 1),
            "load_adapters_s": round(engine.load_adapters_s, 1),
            "machine": self._machine,
        }

    def _engine_for(self, needs: EngineNeeds) -> BenchEngine:
        if self._engine is not None and self._needs == needs:
            return self._engine
        self.drop_engine()
        free_memory()
        paths = self._adapters.paths(needs.lora_rank, needs.num_adapters)
        num_device = _at_most(needs.num_device_adapters, needs.num_adapters)
        num_host = _at_most(needs.num_host_adapters, needs.num_adapters)
        one = self._adapters.num_bytes(needs.lora_rank)
        config = options.make_config(
            self.model,
            self._given,
            max_num_batched_tokens=needs.max_num_batched_tokens,
            lora_rank=needs.lora_rank,
            device_adapter_bytes=num_device * one,
            host_adapter_bytes=num_host * one,
            num_device_adapters=num_device,
        )
        if self._machine is None:
            self._machine = describe_machine(config.device, self._args.commit)
        logger.info("starting an engine with %s", needs.describe())
        self._engine, self._needs = BenchEngine(config, paths), needs
        logger.info(
            "the engine was ready after %.1f s, its adapters after %.1f s more",
            self._engine.start_s,
            self._engine.load_adapters_s,
        )
        return self._engine

    def drop_engine(self) -> None:
        """Close the engine, if there is one; the next measurement starts another."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    @staticmethod
    def _describe_config(engine: BenchEngine) -> dict[str, Any]:
        config, info = engine.core.config, engine.core.model_info
        return {
            "device": config.device,
            "dtype": config.dtype,
            "attention_backend": config.chosen_attention_backend,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_loras": config.max_loras,
            "max_lora_rank": config.max_lora_rank,
            "lora_memory_gb": round(config.lora_memory_gb, 3),
            "lora_host_memory_gb": round(config.lora_host_memory_gb, 3),
            "async_scheduling": config.async_scheduling,
            "enforce_eager": config.enforce_eager,
            "num_device_pages": info.num_device_pages,
            "max_model_len": info.max_model_len,
        }


def make_smallest(workload: Workload) -> Workload:
    """The same kind of workload with a few short requests: to see that it runs, not how fast."""
    small = replace(
        workload,
        num_requests=min(workload.num_requests, 6),
        num_prompt_tokens=min(workload.num_prompt_tokens, 12),
        num_output_tokens=min(workload.num_output_tokens, 4),
    )
    return small if isinstance(small, ClosedBatch) else replace(small, rate=200.0)


def _at_most(number: int | None, most: int) -> int:
    return most if number is None else min(number, most)
