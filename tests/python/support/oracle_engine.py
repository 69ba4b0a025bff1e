"""Executors for an engine process of its own, by 'module:function'."""

from __future__ import annotations

import threading
import time
from collections import Counter

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.engine.grammar_compiler import GrammarCompiler
from lora_serve.testing.oracle_adapters import OracleAdapterStore
from lora_serve.testing.oracle_executor import OracleExecutor, OracleOptions
from support.tiny_checkpoint import VOCAB_SIZE


class SlowOracle(OracleExecutor):
    """Takes a moment for each step, so that a test can act while requests run."""

    def run_plan(self, plan, states):
        time.sleep(0.02)
        return super().run_plan(plan, states)


class BreakingOracle(SlowOracle):
    """Fails in the third step in which several requests run."""

    num_shared_steps = 0

    def run_plan(self, plan, states):
        self.num_shared_steps += len(plan.request_ids) > 1
        if self.num_shared_steps == 3:
            raise RuntimeError("the third shared step broke")
        return super().run_plan(plan, states)


class ForgetfulOracle(OracleExecutor):
    """Holds one adapter at a time, and cannot bring back any that it held before."""

    def __init__(self, options):
        super().__init__(options)
        self.lora = OracleAdapterStore(memory_bytes=options.adapter_memory_bytes)
        self.num_loads = Counter()
        self.load_fails = self.is_back

    def is_back(self, adapter_id):
        self.num_loads[adapter_id] += 1
        return self.num_loads[adapter_id] > 1


def _options(config: EngineConfig, **more) -> OracleOptions:
    return OracleOptions(
        num_device_pages=128,
        page_size=config.page_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=512,
        vocab_size=VOCAB_SIZE,
        **more,
    )


def make_oracle(config):
    return OracleExecutor(_options(config))


def make_slow_oracle(config):
    return SlowOracle(_options(config))


def make_oracle_with_endless_forms(config):
    """A form whose text begins with 'endless' is never compiled."""
    run = GrammarCompiler._run

    def run_or_wait(self, source, compilation):
        if source.text.startswith("endless"):
            threading.Event().wait()
        run(self, source, compilation)

    GrammarCompiler._run = run_or_wait
    return SlowOracle(_options(config))


def make_forgetful_oracle(config):
    return ForgetfulOracle(_options(config, adapter_memory_bytes=1024))


def make_breaking_oracle(config):
    return BreakingOracle(_options(config))


def refuse_to_start(config):
    raise InvalidArgumentError(f"model {config.model!r} cannot be served; try another")


def crash_at_start(config):
    raise OSError("the disk is on fire")


def die_at_start(config):
    import os

    os._exit(7)
