"""One device with its copies, for tests that run alike on the CPU and on CUDA."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lora_serve.lora.adapter_copies import AdapterCopies, CpuCopies, CudaCopies, PendingCopy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TIMEOUT_S = 60
BOUNCE_BYTES = 1000
_LONG_CYCLES = 2_000_000_000  # about a second
_SHORT_CYCLES = 500_000


class DeviceSetup:
    """A device, its copies, and ways to keep its streams busy; the body of a test is its execution stream."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.execution = torch.cuda.Stream() if device == "cuda" else None
        self._cpu_copies = CpuCopies() if device == "cpu" else None
        self._cuda_copies = CudaCopies(device, self.execution, BOUNCE_BYTES) if device == "cuda" else None
        copies = self._cpu_copies or self._cuda_copies
        assert copies is not None
        self.copies: AdapterCopies = copies
        self._outstanding: deque[torch.cuda.Event] = deque()
        if self.execution is not None:
            with torch.cuda.stream(self.execution):
                self._warm_up()

    def _warm_up(self) -> None:
        """Use every operation once: CUDA loads a kernel on its first use, and may wait for all streams."""
        memory = self.on_device(random_bytes(4 * BOUNCE_BYTES))
        self.copies.move(memory, 1, 0, 3 * BOUNCE_BYTES)
        self.copies.move(memory, 2 * BOUNCE_BYTES, 0, BOUNCE_BYTES)
        self.copies.write_row(memory[:16], torch.ones(16, dtype=torch.uint8))
        assert bool((memory[:16].clone() == 1).all())
        assert memory.any()
        torch.cuda._sleep(1)
        wait_done(self.copies.start_load(self.host_bytes(torch.zeros(16, dtype=torch.uint8)), memory[:16]))
        torch.cuda.synchronize()

    def end_step(self) -> torch.cuda.Event | None:
        """Wait as an engine does that has two steps outstanding; give its end, None where it is over."""
        if self.execution is None:
            return None
        self._outstanding.append(self.execution.record_event())
        if len(self._outstanding) > 2:
            self._outstanding.popleft().synchronize()
        return self._outstanding[-1]

    def keep_steps_busy(self, *, is_long: bool = True) -> None:
        """What is submitted next to the execution stream runs later; on the CPU it is over already."""
        if self.execution is not None:
            with torch.cuda.stream(self.execution):
                torch.cuda._sleep(_LONG_CYCLES if is_long else _SHORT_CYCLES)

    @contextmanager
    def loads_held_up(self) -> Iterator[None]:
        """Loads that are started inside are not done before the end, where the test is quick."""
        gate = threading.Event()
        if self._cpu_copies is not None:
            self._cpu_copies._thread.submit(gate.wait, TIMEOUT_S)
        if self._cuda_copies is not None:
            with torch.cuda.stream(self._cuda_copies._loads):
                torch.cuda._sleep(_LONG_CYCLES)
        try:
            yield
        finally:
            gate.set()

    def slow_loads_down(self) -> None:
        """The next load takes a while, without anybody's help."""
        if self._cpu_copies is not None:
            self._cpu_copies._thread.submit(time.sleep, 0.05)
        if self._cuda_copies is not None:
            with torch.cuda.stream(self._cuda_copies._loads):
                torch.cuda._sleep(_LONG_CYCLES)

    def host_bytes(self, content: Tensor) -> Tensor:
        """A copy in memory that a load may come from."""
        return content.pin_memory() if self.device.type == "cuda" else content.clone()

    def on_device(self, content: Tensor) -> Tensor:
        """A copy on the device."""
        return content.to(self.device, copy=True)

    def wait(self) -> None:
        """Until all steps are over."""
        if self.execution is not None:
            self.execution.synchronize()


def on_devices(test):
    """Run a test that takes `setup` on the CPU, and on CUDA if asked."""
    return pytest.mark.parametrize("setup", DEVICES, indirect=True)(test)


def wait_done(copy: PendingCopy) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not copy.is_done():
        assert time.monotonic() < deadline, "the copy does not end"
        time.sleep(0.0005)
    assert copy.error is None


def random_bytes(num_bytes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
