"""Pages of two tiers with the copies between them, for tests that run alike on the CPU and on CUDA."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from lora_serve.executor.host_pages import HostPages
from lora_serve.executor.memcpy_batch import MemcpyBatch
from lora_serve.executor.page_copies import CpuPageCopies, CudaPageCopies
from lora_serve.executor.transfers import PageTransfers, TransferReports

from .plans import PlanStandIn

NUM_DEVICE_PAGES = 6
NUM_HOST_PAGES = 9
PAGE_SHAPE = (3, 2, 4, 2, 8)  # layers, keys and values, G, kv_heads, D
_LONG_CYCLES = 4_000_000_000  # Two seconds: other tests may share the device and the cores.
_TIMEOUT_S = 60

ON_CUDA = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda, one by one", "cuda, in a batch")]
ON_DEVICES = ["cpu", *ON_CUDA]


class TransferSetup:
    """The host tier is full of NaN, so that nothing that was never copied goes unseen.

    On CUDA the test's body runs on the execution stream.
    """

    def __init__(
        self, way: str, num_device_pages: int = NUM_DEVICE_PAGES, num_host_pages: int = NUM_HOST_PAGES
    ) -> None:
        self.is_cuda = way != "cpu"
        device = torch.device("cuda" if self.is_cuda else "cpu")
        self.pool = random_pages(num_device_pages).to(device)
        self.host_pages = HostPages(num_host_pages, self.pool)
        self.block = self.host_pages.block.fill_(torch.nan)
        if self.is_cuda:
            batch = MemcpyBatch.find(device) if way == "cuda, in a batch" else None
            if way == "cuda, in a batch" and batch is None:
                pytest.skip("the driver has no batched copies")
            self.execution = torch.cuda.Stream()
            self.copies: CpuPageCopies | CudaPageCopies = CudaPageCopies(
                self.pool,
                self.block,
                self.execution,
                batch=batch,
                max_copy_bytes=2 * self.pool[0].nbytes,
            )
            torch.cuda.set_stream(self.execution)
        else:
            self.copies = CpuPageCopies(self.pool, self.block)
        self.transfers = PageTransfers(self.host_pages, num_device_pages, self.copies)
        if self.is_cuda:
            self._warm_up()

    def _warm_up(self) -> None:
        """Use every operation once: CUDA loads a kernel on its first use, and may wait for all streams."""
        torch.cuda._sleep(1)
        kept = self.pool.clone()
        self.pool[:1].fill_(1.0)
        self.pool.copy_(kept)
        torch.cuda.synchronize()

    def start(self, *transfers: tuple[int, int, list[int], list[int]]) -> None:
        """Begin copies (id, kind, sources, destinations) as one plan."""
        self.transfers.start(PlanStandIn(transfers=list(transfers)))

    def wait_for_reports(self, num: int) -> TransferReports:
        """Ask until so many copies are reported."""
        found = TransferReports()
        deadline = time.monotonic() + _TIMEOUT_S
        while len(found.completed) + len(found.failed) < num:
            assert time.monotonic() < deadline, f"{found} is all that was reported"
            reports = self.transfers.take_reports()
            found.completed.extend(reports.completed)
            found.failed.update(reports.failed)
        return found

    def keep_steps_busy(self) -> torch.cuda.Event:
        """What is submitted next to the execution stream runs later; give the event of that time."""
        torch.cuda._sleep(_LONG_CYCLES)
        return self.execution.record_event()

    def hold_copies_up(self) -> torch.cuda.Event:
        """Copies that are started next run later; give the event of that time."""
        assert isinstance(self.copies, CudaPageCopies)
        streams = (self.copies._write_backs, self.copies._load_backs)
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(_LONG_CYCLES)
        return streams[1].record_event()

    def close(self) -> None:
        self.transfers.close()
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.set_stream(torch.cuda.default_stream())


def random_pages(num_pages: int, seed: int = 0) -> Tensor:
    """[num_pages, *PAGE_SHAPE] on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num_pages, *PAGE_SHAPE), generator=generator)


def on_devices(test):
    """Run a test that takes `setup` on the CPU, and in both ways on CUDA if asked."""
    return pytest.mark.parametrize("setup", ON_DEVICES, indirect=True)(test)


def on_cuda(test):
    """Run a test that takes `setup` in both ways on CUDA if asked."""
    return pytest.mark.parametrize("setup", ON_CUDA, indirect=True)(test)
