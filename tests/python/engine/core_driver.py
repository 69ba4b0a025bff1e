"""Drives an EngineCore over the real scheduler and the oracle executor, step by step."""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_COMPLETED, wait

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.engine_core import EngineCore
from lora_serve.engine.messages import EngineRequest
from lora_serve.testing.oracle_adapters import OracleAdapterStore, make_oracle_adapter
from lora_serve.testing.oracle_executor import OracleExecutor, OracleOptions
from lora_serve.testing.oracle_tokens import oracle_tokens


class FilesOfTheTest(OracleAdapterStore):
    """Adapters whose content the test writes; a read waits while its path is held."""

    def __init__(self, memory_bytes):
        super().__init__(memory_bytes=memory_bytes)
        self.contents = {}
        self.num_reads = 0
        self.is_cancelled = {}  # What the newest read of each path was told to ask.
        self._gates = {}
        self._read_begins = threading.Condition()

    def wait_for_reads(self, num_reads):
        """Wait until this many reads have begun, which have seen their content."""
        with self._read_begins:
            assert self._read_begins.wait_for(lambda: self.num_reads >= num_reads, 60)

    def hold(self, path):
        self._gates[path] = threading.Event()

    @property
    def holds_a_read(self):
        return bool(self._gates)

    def release(self, path):
        self._gates.pop(path).set()

    def read(self, path, name=None, is_cancelled=None):
        content = self.contents.get(path, path)
        self.is_cancelled[path] = is_cancelled
        with self._read_begins:
            self.num_reads += 1
            self._read_begins.notify_all()
        gate = self._gates.get(path)
        if gate is not None:
            assert gate.wait(60)
        if isinstance(content, Exception):
            raise content
        if content == "bad":
            raise InvalidArgumentError(f"adapter {name!r} in {path!r} is bad; make it good")
        return make_oracle_adapter(path, content, num_bytes=1024, lora_rank=8)


class TroubledExecutor(OracleExecutor):
    """The oracle, with failures on demand."""

    def __init__(self, options):
        super().__init__(options)
        self.lora = FilesOfTheTest(options.adapter_memory_bytes)
        self.failing_request_ids = set()
        self.raises = None
        self.is_closed = False
        self.failing_loads = set()
        self.transfer_kinds = {}
        self.load_fails = lambda adapter_id: adapter_id in self.failing_loads

    def run_plan(self, plan, states):
        if self.raises is not None:
            raise self.raises
        assert not self.is_closed
        kinds = zip(plan.transfer_ids.tolist(), plan.transfer_kinds.tolist(), strict=True)
        self.transfer_kinds.update(kinds)
        return super().run_plan(plan, states)

    def find_row_errors(self, plan):
        return {
            row: "logits are not finite"
            for row, request_id in enumerate(plan.request_ids.tolist())
            if request_id in self.failing_request_ids and plan.samples_token[row]
        }

    def close(self):
        self.is_closed = True


class CoreDriver:
    """An engine, what it has said so far, and the answers that each request would get alone.

    Options are those of the engine's configuration and of the oracle, whose memory follows the former.
    """

    async_scheduling = True
    """For all drivers; the fixture of this name tries both."""
    step_s = 0.001
    """A step moves the engine's clock by so much."""

    def __init__(self, **options):
        fields = set(EngineConfig.__struct_fields__)
        config = EngineConfig(
            **{
                "model": "oracle",
                "page_size": 4,
                "num_device_pages": 64,
                "max_num_seqs": 4,
                "max_num_batched_tokens": 16,
                "max_loras": 2,
                "async_scheduling": self.async_scheduling,
                **{name: value for name, value in options.items() if name in fields},
            }
        )
        self.executor = TroubledExecutor(
            OracleOptions(
                num_device_pages=config.num_device_pages,
                page_size=config.page_size,
                max_num_seqs=config.max_num_seqs,
                max_model_len=64,
                adapter_memory_bytes=round(config.lora_memory_gb * 2**30),
                **{name: value for name, value in options.items() if name not in fields},
            )
        )
        self.files = self.executor.lora
        self.seconds = 1000.0
        self.core = EngineCore(config, self.executor, clock_us=lambda: round(self.seconds * 1e6))
        self.outputs = {}
        self.errors = {}
        self.finish = {}
        self.cached = {}
        self._requests = {}
        self._next_id = 0

    # --- Doing --------------------------------------------------------------------------------------------

    def add(self, lora_name=None, prompt=None, *, priority=0, queue_timeout_s=None, domain=b"", **params):
        """Add a request; give its id."""
        request_id = self._next_id
        self._next_id += 1
        prompt = list(range(10)) if prompt is None else prompt
        params = SamplingParams(**{"max_tokens": 6, "temperature": 0, **params})
        admission = self.core.add_request(
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=prompt,
                sampling_params=params,
                lora_name=lora_name,
                priority=priority,
                queue_timeout_s=queue_timeout_s,
                isolation_domain=domain,
            )
        )
        self._requests[request_id] = (admission.adapter_id, prompt, params.max_tokens)
        self.outputs[request_id] = []
        return request_id

    def step(self, num_steps=1):
        for _ in range(num_steps):
            self.seconds += self.step_s
            for output in self.core.step():
                request_id = output.request_id
                assert request_id not in self.finish, f"request {request_id} got an output after its last"
                self.outputs[request_id] += output.new_token_ids
                self.cached[request_id] = output.num_cached_tokens
                if output.error is not None:
                    self.errors[request_id] = output.error.to_exception()
                if output.finish_reason is not None:
                    self.finish[request_id] = (output.finish_reason, output.stop_reason)
            if self.core.failure is None:
                self.core._scheduler.check_invariants()

    def step_until(self, condition, max_steps=500):
        for _ in range(max_steps):
            if condition():
                return
            self.step()
        raise AssertionError("the condition was not met")

    def run(self):
        """Step until nothing is left to do, reads included."""
        for _ in range(20_000):
            if self.core.has_work:
                self.step()
            elif self._pending_reads:
                self.wait_for_reads()
            else:
                return
        raise AssertionError(f"the engine does not come to rest: {self.core.stats()} {self.core.adapters()}")

    def load(self, name, path, **options):
        """Load and wait; give the result or raise."""
        operation = self.core.load_adapter(name, path, **options)
        self.wait_for(operation)
        return operation.result()

    def unload(self, name, **options):
        operation = self.core.unload_adapter(name, **options)
        self.wait_for(operation)
        return operation.result()

    def wait_for(self, operation):
        for _ in range(2000):
            if operation.done():
                return
            if not self.files.holds_a_read:
                self.wait_for_reads()  # So that no request gets further than the test means it to.
            elif not self.core.has_work:
                wait(self._pending_reads, timeout=60, return_when=FIRST_COMPLETED)
            self.step()
        raise AssertionError("the operation does not complete")

    def wait_for_reads(self):
        wait(self._pending_reads, timeout=60)

    @property
    def _pending_reads(self):
        return [load.read for load in self.core._operations._loads.heads if load.read is not None]

    # --- Looking ------------------------------------------------------------------------------------------

    def expected(self, request_id):
        adapter_id, prompt, max_tokens = self._requests[request_id]
        return oracle_tokens(adapter_id, prompt, max_tokens, self.executor.vocab_size)

    def adapter_id_of(self, request_id):
        return self._requests[request_id][0]

    def assert_complete(self, *request_ids):
        """These requests ended at their length with the tokens of a run alone."""
        for request_id in request_ids:
            assert self.outputs[request_id] == self.expected(request_id)
            assert self.finish[request_id] == ("length", None)

    def assert_nothing_left_of(self, *adapter_ids):
        assert not set(adapter_ids) & {info.adapter_id for info in self.core.adapters()}
        for adapter_id in adapter_ids:
            assert adapter_id not in self.files
        assert not set(adapter_ids) & {a.adapter_id for a in self.core._scheduler.stats().adapters}
        stats = self.core.stats()
        assert stats.num_device_pages == stats.num_free_pages + stats.num_tree_pages + stats.num_private_pages

    def assert_pages_free(self):
        stats = self.core.stats()
        assert stats.num_private_pages == 0
        assert stats.num_waiting_requests == stats.num_running_requests == 0

    def info(self, name):
        return [info for info in self.core.adapters() if info.name == name]
