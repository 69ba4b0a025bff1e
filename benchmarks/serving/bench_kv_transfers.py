"""Write-backs and load-backs of KV pages of Qwen3-8B's shape, 2.36 MB each, beside one plain pinned copy.

Measured: from the start of a copy until it can be reported, for one run of neighbouring pages and for pages
all over both tiers; how long the calling thread is busy with it, which the step loop pays; and how long a
copy of 4 KiB takes on the execution stream meanwhile, in the same direction, as a step's inputs and tokens
do. Ways: torch submits the pieces one by one, or the driver takes them in a batch. `plain` is one copy of as
many bytes. On a machine without CUDA the device is the CPU, and only the whole time is of interest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.executor.host_pages import HostPages
from lora_serve.executor.memcpy_batch import MemcpyBatch
from lora_serve.executor.page_copies import MAX_COPY_BYTES, CpuPageCopies, CudaPageCopies, PageCopies
from lora_serve.executor.transfer_orders import LOAD_BACK, WRITE_BACK, Transfer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import append_rows
from timing import percentiles

KINDS = {WRITE_BACK: "write back", LOAD_BACK: "load back"}
SMALL_BYTES = 4096


class Tiers:
    """The memory of both tiers, the ways to copy, and what is measured with them."""

    def __init__(self, page_shape: tuple[int, ...], num_pages: int) -> None:
        self.is_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.is_cuda else "cpu")
        generator = torch.Generator(self.device).manual_seed(0)
        self.pool = torch.randn(
            (num_pages, *page_shape), dtype=torch.bfloat16, device=self.device, generator=generator
        )
        self.host_pages = HostPages(num_pages, self.pool)
        self.host_pages.block.copy_(self.pool)
        self.num_pages = num_pages
        self.page_bytes = self.pool[0].nbytes
        self.small_host = torch.zeros(SMALL_BYTES, dtype=torch.uint8, pin_memory=self.is_cuda)
        self.small_device = torch.zeros(SMALL_BYTES, dtype=torch.uint8, device=self.device)

    def ways(self, max_copy_bytes: int) -> dict[str, PageCopies]:
        """The ways to copy, by name."""
        block = self.host_pages.block
        if not self.is_cuda:
            return {"at once": CpuPageCopies(self.pool, block)}
        batch = MemcpyBatch.find(self.device)
        if batch is None:
            print("the driver has no batched copies", file=sys.stderr)
        return {
            name: CudaPageCopies(self.pool, block, batch=found, max_copy_bytes=max_copy_bytes)
            for name, found in (("one by one", None), ("batch", batch))
            if name == "one by one" or found is not None
        }

    def page_ids(self, is_run: bool, num_pages: int, seed: int) -> npt.NDArray[np.int32]:
        """Pages of one tier."""
        rng = np.random.default_rng(seed)
        if is_run:
            first = int(rng.integers(0, self.num_pages - num_pages + 1))
            return np.arange(first, first + num_pages, dtype=np.int32)
        return rng.permutation(self.num_pages)[:num_pages].astype(np.int32)

    def ends(self, kind: int) -> tuple[Tensor, Tensor]:
        """Source and destination of a kind."""
        tiers = (self.pool, self.host_pages.block)
        return tiers if kind == WRITE_BACK else tiers[::-1]

    def time_plain(self, kind: int, num_pages: int) -> float:
        """One copy of neighbouring pages, in ms."""
        source, destination = self.ends(kind)
        begin = time.perf_counter()
        destination[:num_pages].copy_(source[:num_pages], non_blocking=True)
        self.wait()
        return (time.perf_counter() - begin) * 1e3

    def time_small(self, kind: int) -> float:
        """A copy of a step's size on the execution stream, in us."""
        small = (self.small_device, self.small_host)
        source, destination = small if kind == WRITE_BACK else small[::-1]
        begin = time.perf_counter()
        destination.copy_(source, non_blocking=True)
        self.wait()
        return (time.perf_counter() - begin) * 1e6

    def wait(self) -> None:
        """Until the execution stream is idle; asking all the time, as that is the quickest."""
        if self.is_cuda:
            end = torch.cuda.current_stream().record_event()
            while not end.query():
                pass


def time_copy(copies: PageCopies, transfer: Transfer) -> tuple[float, float]:
    """Time until the copy is over, in ms, and of the calling thread, in us."""
    begin = time.perf_counter()
    (copy,) = copies.start([transfer])
    returned = time.perf_counter()
    while not copy.is_done():
        pass
    end = time.perf_counter()
    if copy.error is not None:
        raise copy.error
    return (end - begin) * 1e3, (returned - begin) * 1e6


def time_small_beside(tiers: Tiers, copies: PageCopies, transfer: Transfer) -> list[float]:
    """Small copies, one after the other, while a large one runs, in us each."""
    (copy,) = copies.start([transfer])
    times = [tiers.time_small(transfer.kind)]
    while not copy.is_done():
        times.append(tiers.time_small(transfer.kind))
    return times


def ends_of_some_pages(tiers: Tiers, transfer: Transfer) -> tuple[Tensor, Tensor]:
    """Copies of up to three pages of the source and of their places in the destination, on the CPU."""
    places = [0, len(transfer.source_pages) // 2, -1]
    both = zip(tiers.ends(transfer.kind), (transfer.source_pages, transfer.destination_pages), strict=True)
    source, destination = (tier[pages[places].tolist()].cpu() for tier, pages in both)
    return source, destination


def repeated(run: Callable[[], float], repetitions: int) -> list[float]:
    """Results of `run`, after two that do not count."""
    return [run() for _ in range(repetitions + 2)][2:]


def bench(
    tiers: Tiers, way: str, copies: PageCopies, transfer: Transfer, ids: str, max_copy_bytes: int, reps: int
) -> dict[str, object]:
    """Measure one copy and print its row."""
    kind, num_pages = transfer.kind, len(transfer.source_pages)
    num_bytes = num_pages * tiers.page_bytes
    plain = percentiles(repeated(lambda: tiers.time_plain(kind, num_pages), reps))[1]
    tiers.ends(kind)[1][transfer.destination_pages.tolist()] = 0.0
    tiers.wait()
    calling_us: list[float] = []

    def run() -> float:
        whole_ms, calling = time_copy(copies, transfer)
        calling_us.append(calling)
        return whole_ms

    p20, p50, p80 = percentiles(repeated(run, reps))
    # A copy that does nothing is always the fastest.
    assert torch.equal(*ends_of_some_pages(tiers, transfer))
    alone = percentiles(repeated(lambda: tiers.time_small(kind), 50))[1]
    beside = [one for _ in range(5) for one in time_small_beside(tiers, copies, transfer)]
    row: dict[str, object] = {
        "workload": KINDS[kind],
        "way": way,
        "ids": ids,
        "num_pages": num_pages,
        "num_bytes": num_bytes,
        "max_copy_bytes": max_copy_bytes,
        "p20_ms": round(p20, 3),
        "p50_ms": round(p50, 3),
        "p80_ms": round(p80, 3),
        "p50_gb_per_s": round(num_bytes / p50 / 1e6, 2),
        "plain_gb_per_s": round(num_bytes / plain / 1e6, 2),
        "share_of_plain": round(plain / p50, 3),
        "calling_thread_us": round(percentiles(calling_us[2:])[1], 1),
        "small_copy_alone_us": round(alone, 1),
        "small_copy_beside_p50_us": round(percentiles(beside)[1], 1),
        "small_copy_beside_max_us": round(max(beside), 1),
        "repetitions": reps,
    }
    print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="few small pages, two repetitions; no rows")
    parser.add_argument("--pages", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true", help="write no rows")
    options = parser.parse_args()
    page_shape = (36, 2, 16, 8, 128)
    if options.smallest:
        page_shape, options.pages, options.repetitions = (2, 2, 16, 2, 16), [1, 8], 2
    most = max(options.pages)
    tiers = Tiers(page_shape, 2 * most)
    # Pages are copied one by one unless they are neighbours, so only runs can come in pieces of other sizes.
    sizes = [(MAX_COPY_BYTES, options.pages, True), (MAX_COPY_BYTES, options.pages, False)]
    if not options.smallest:
        sizes += [(num_bytes, [most], True) for num_bytes in (1 << 20, 128 << 20, 4 << 30)]
    rows = []
    for max_copy_bytes, counts, is_run in sizes:
        for way, copies in tiers.ways(max_copy_bytes).items():
            for kind in KINDS:
                for num_pages in counts:
                    pages = [tiers.page_ids(is_run, num_pages, seed) for seed in (1, 2)]
                    transfer, ids = Transfer(0, kind, *pages), "one run" if is_run else "scattered"
                    rows.append(bench(tiers, way, copies, transfer, ids, max_copy_bytes, options.repetitions))
            copies.close()
    tiers.host_pages.close()
    if not (options.smallest or options.dry_run):
        print(f"appended to {append_rows('kv_transfers', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
