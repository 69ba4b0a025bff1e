"""What it costs to bring one LoRA adapter from a file or from host memory to the device.

The adapter has the shape of one for Qwen3-8B: A [R, H] and B [R, O] in bf16 on all seven projections of 36
layers, 504 tensors, 87 MB at rank 16. Every time is of a whole adapter. Nothing of lora_serve is timed: the
figures say what the machine allows, and the devices simulated in benchmarks/scheduler_sim load at them.

Without CUDA only the files and the digests are measured, into pageable memory.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import append_rows
from timing import percentiles, wall_times_ms

# Qwen3-8B: input and output features of its projections.
PROJECTIONS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 12288),
    "mlp.up_proj": (4096, 12288),
    "mlp.down_proj": (12288, 4096),
}
CHUNK_BYTES = 8 << 20  # what the pipelined provider reads before it starts the copy
ALIGNMENT = 4096

Run = Callable[[], object]


@dataclass
class Adapter:
    """One adapter: its file, and the file's payload (all tensors, end to end) in host memory."""

    lora_rank: int
    num_layers: int
    path: Path
    sizes: list[int] = field(default_factory=list)  # bytes of each tensor, in the order of the payload
    payload: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    @property
    def num_bytes(self) -> int:
        return self.payload.numel()

    def write(self) -> None:
        """Draw the weights, save them and flush the file, so that its pages can be dropped from the cache."""
        generator = torch.Generator().manual_seed(self.lora_rank)
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(self.num_layers):
            for name, (num_in, num_out) in PROJECTIONS.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                for half, width in (("lora_A", num_in), ("lora_B", num_out)):
                    weights = torch.randn(self.lora_rank, width, generator=generator)
                    tensors[f"{prefix}.{half}.weight"] = weights.to(torch.bfloat16)
        save_file(tensors, self.path)
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
            start, header = read_header(file.fileno())
            spans = sorted(entry["data_offsets"] for entry in header.values())
            self.sizes = [end - begin for begin, end in spans]
            file.seek(start)
            self.payload = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)


def read_header(descriptor: int) -> tuple[int, dict[str, dict[str, list[int]]]]:
    """Where the payload of a safetensors file starts, and its table of tensors."""
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
    header = json.loads(os.pread(descriptor, length, 8))
    header.pop("__metadata__", None)
    return 8 + length, header


def spans_of(num_bytes: int, num_parts: int) -> Iterator[tuple[int, int]]:
    """Split into about equal, aligned half-open ranges."""
    step = -(-num_bytes // (num_parts * ALIGNMENT)) * ALIGNMENT
    for begin in range(0, num_bytes, step):
        yield begin, min(begin + step, num_bytes)


def read_span(descriptor: int, start: int, into: memoryview, span: tuple[int, int]) -> None:
    """Plain reads of payload bytes [begin, end) to the same place of `into`."""
    begin, end = span
    while begin < end:
        count = os.preadv(descriptor, [into[begin:end]], start + begin)
        if count == 0:
            raise EOFError(f"the file ends {end - begin} bytes early")
        begin += count


class Reader:
    """Reads an adapter's file into one buffer with some threads; the header is parsed on the way."""

    def __init__(self, adapter: Adapter, buffer: torch.Tensor, num_threads: int) -> None:
        self.path = adapter.path
        self.into = buffer.numpy().data
        self.num_bytes = adapter.num_bytes
        self.num_threads = num_threads
        self.pool = ThreadPoolExecutor(num_threads)

    def read(self, after_chunk: Callable[[int, int], None] | None = None) -> None:
        """Read it all. `after_chunk` gets each range of at most CHUNK_BYTES once it has been read."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            start, _ = read_header(descriptor)
            num_chunks = -(-self.num_bytes // CHUNK_BYTES)
            num_parts = self.num_threads if after_chunk is None else max(num_chunks, self.num_threads)
            spans = list(spans_of(self.num_bytes, num_parts))
            jobs = [self.pool.submit(read_span, descriptor, start, self.into, span) for span in spans]
            for job, span in zip(jobs, spans, strict=True):
                job.result()
                if after_chunk is not None:
                    after_chunk(*span)
        finally:
            os.close(descriptor)


def cached_share(path: Path) -> float:
    """The share of the file's pages that lie in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    num_pages = -(-len(view) // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * num_pages)()
    first = ctypes.c_char.from_buffer(view)
    failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(view)), flags)
    del first
    view.close()
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(flag & 1 for flag in flags) / num_pages


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return output.splitlines()[0].strip()


class Report:
    """Collects the rows and prints each as it comes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.driver = driver_version() if torch.cuda.is_available() else ""

    def add(
        self,
        workload: str,
        provider: str,
        adapter: Adapter,
        times_ms: list[float],
        num_threads: int = 1,
        calling_thread_ms: list[float] | None = None,
        slowdown_percent: list[float] | None = None,
    ) -> None:
        """One row. The last two: how long the calling thread was busy; what the matrix products lost."""
        p20, p50, p80 = percentiles(times_ms)
        row: dict[str, object] = {
            "workload": workload,
            "provider": provider,
            "num_threads": num_threads,
            "lora_rank": adapter.lora_rank,
            "num_bytes": adapter.num_bytes,
            "p20_ms": round(p20, 4),
            "p50_ms": round(p50, 4),
            "p80_ms": round(p80, 4),
            "p50_gb_per_s": round(adapter.num_bytes / p50 / 1e6, 2),
            "p50_calling_thread_ms": round(statistics.median(calling_thread_ms), 4)
            if calling_thread_ms
            else "",
            "p50_slowdown_percent": round(statistics.median(slowdown_percent), 2) if slowdown_percent else "",
            "repetitions": len(times_ms),
            "driver": self.driver,
        }
        self.rows.append(row)
        busy = f"  calling thread {row['p50_calling_thread_ms']} ms" if calling_thread_ms else ""
        lost = f"  products {row['p50_slowdown_percent']}% slower" if slowdown_percent else ""
        print(
            f"{workload:30} {provider:28} {num_threads} threads, rank {adapter.lora_rank:2}: "
            f"{p20:9.3f} {p50:9.3f} {p80:9.3f} ms  {row['p50_gb_per_s']:>7} GB/s{busy}{lost}",
            flush=True,
        )


def check_filled(destination: torch.Tensor, run: Run, adapter: Adapter) -> None:
    """Raise unless `run` brings the whole payload to `destination`: doing nothing would be fastest."""
    destination.fill_(0xA5)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if not torch.equal(destination.cpu(), adapter.payload):
        raise AssertionError("the destination does not hold the adapter")


def bench_files(adapter: Adapter, repetitions: int, report: Report) -> None:
    """From the file to host memory, with the file in the page cache and not."""
    is_pinned = torch.cuda.is_available()
    memory = "pinned" if is_pinned else "pageable"
    buffer = torch.empty(adapter.num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
    for num_threads in (1, 4):
        reader = Reader(adapter, buffer, num_threads)
        check_filled(buffer, reader.read, adapter)
        times = wall_times_ms(reader.read, repetitions)
        report.add("warm file to host", f"read, {memory}", adapter, times, num_threads)
        drop_from_page_cache(adapter.path)
        share = cached_share(adapter.path)
        if share > 0.01:
            print(f"skipped: cold file to host ({share:.0%} of the file stay in the page cache here)")
        else:
            drop = partial(drop_from_page_cache, adapter.path)
            times = wall_times_ms(reader.read, max(repetitions // 2, 1), drop)
            report.add("cold file to host", f"read, {memory}", adapter, times, num_threads)
    times = wall_times_ms(lambda: sum_first(load_file(adapter.path)), repetitions)
    report.add("warm file to host", "load_file, touch each page", adapter, times)
    if is_pinned:
        times = wall_times_ms(lambda: sum_first(pin_each(load_file(adapter.path))), max(repetitions // 2, 1))
        report.add("warm file to host", "load_file, pin each tensor", adapter, times)


def pin_each(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.pin_memory() for name, tensor in tensors.items()}


def sum_first(tensors: dict[str, torch.Tensor]) -> None:
    """Touch every page of every tensor: a memory-mapped file is only read when somebody looks."""
    for tensor in tensors.values():
        tensor.view(torch.uint8).view(-1)[::ALIGNMENT].sum()


def bench_digests(adapter: Adapter, repetitions: int, report: Report) -> None:
    """Digests of the payload that the standard library has; the cryptographic ones first."""
    view = adapter.payload.numpy().data
    quarters = [view[begin:end] for begin, end in spans_of(len(view), 4)]
    pool = ThreadPoolExecutor(4)
    for name in ("sha256", "blake2b", "sha512", "sha1"):
        times = wall_times_ms(partial(digest, name, view), repetitions)
        report.add("digest", name, adapter, times)
    for function in (zlib.crc32, zlib.adler32):
        report.add("digest", function.__name__, adapter, wall_times_ms(partial(function, view), repetitions))
    for name in ("sha256", "blake2b"):
        run = partial(digest_of_parts, name, quarters, pool)
        report.add("digest", f"{name} of four quarters", adapter, wall_times_ms(run, repetitions), 4)


def digest(name: str, data: memoryview | bytes) -> bytes:
    return hashlib.new(name, data).digest()


def digest_of_parts(name: str, parts: list[memoryview], pool: ThreadPoolExecutor) -> bytes:
    """The digest of the parts' digests, which are computed side by side."""
    return digest(name, b"".join(pool.map(partial(digest, name), parts)))


class DeviceCopies:
    """The ways of one adapter from host memory to a place on the device that is already allocated."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.stream = torch.cuda.Stream()
        self.pinned = adapter.payload.pin_memory()
        self.pageable = adapter.payload.clone()
        self.destination = torch.empty(adapter.num_bytes, dtype=torch.uint8, device="cuda")
        self.parts_to = list(self.destination.split(adapter.sizes))
        self.parts_from = [part.clone().pin_memory() for part in adapter.payload.split(adapter.sizes)]

    def copy_block(self) -> None:
        self.destination.copy_(self.pinned, non_blocking=True)

    def copy_tensors(self) -> None:
        for to, source in zip(self.parts_to, self.parts_from, strict=True):
            to.copy_(source, non_blocking=True)

    def copy_pageable(self) -> None:
        self.destination.copy_(self.pageable, non_blocking=True)

    def times_ms(self, copy: Run, repetitions: int) -> tuple[list[float], list[float]]:
        """Time on the device from before the first to after the last copy; time of the calling thread."""
        device: list[float] = []
        calling: list[float] = []
        for _ in range(repetitions + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            with torch.cuda.stream(self.stream):
                start = time.perf_counter()
                begin.record()
                copy()
                end.record()
                calling.append((time.perf_counter() - start) * 1e3)
            end.synchronize()
            device.append(begin.elapsed_time(end))
        return device[2:], calling[2:]

    def pin_times_ms(self, repetitions: int) -> list[float]:
        """How long it takes to pin as much memory as the adapter needs; it has been touched before."""
        runtime, memory = torch.cuda.cudart(), self.pageable.clone()
        times: list[float] = []
        for _ in range(repetitions):
            start = time.perf_counter()
            torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
            times.append((time.perf_counter() - start) * 1e3)
            torch.cuda.check_error(runtime.cudaHostUnregister(memory.data_ptr()))
        return times

    def read_then_copy(self, reader: Reader) -> None:
        reader.read()
        with torch.cuda.stream(self.stream):
            self.copy_block()
        self.stream.synchronize()

    def read_while_copying(self, reader: Reader) -> None:
        def copy_chunk(begin: int, end: int) -> None:
            self.destination[begin:end].copy_(self.pinned[begin:end], non_blocking=True)

        with torch.cuda.stream(self.stream):
            reader.read(copy_chunk)
        self.stream.synchronize()


def bench_copies(copies: DeviceCopies, repetitions: int, report: Report, all_providers: bool) -> None:
    """From host memory to the device, on a copy stream while nothing else runs."""
    providers: dict[str, Run] = {"one pinned block": copies.copy_block}
    if all_providers:
        providers[f"{len(copies.parts_from)} pinned tensors"] = copies.copy_tensors
        providers["one pageable block"] = copies.copy_pageable
    for name, copy in providers.items():
        check_filled(copies.destination, copy, copies.adapter)
        device, calling = copies.times_ms(copy, repetitions)
        report.add("host to device", name, copies.adapter, device, calling_thread_ms=calling)
    if all_providers:
        report.add("pin host memory", "cudaHostRegister", copies.adapter, copies.pin_times_ms(repetitions))


def bench_end_to_end(copies: DeviceCopies, repetitions: int, report: Report) -> None:
    """From the file in the page cache to the device."""
    for num_threads in (1, 4):
        reader = Reader(copies.adapter, copies.pinned, num_threads)
        providers = {"read, then copy": copies.read_then_copy, "copy what is read": copies.read_while_copying}
        for name, provider in providers.items():
            run = partial(provider, reader)
            copies.pinned.zero_()
            check_filled(copies.destination, run, copies.adapter)
            times = wall_times_ms(run, repetitions)
            report.add("warm file to device", name, copies.adapter, times, num_threads)


class Products:
    """Matrix products that keep the device busy; `num_weights` of them are rotated past its cache."""

    def __init__(self, num_rows: int, num_in: int, num_out: int, num_weights: int, num_products: int) -> None:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

        self.input = draw(num_rows, num_in)
        self.weights = [draw(num_in, num_out) for _ in range(num_weights)]
        self.output = draw(num_rows, num_out)
        self.num_products = num_products

    def run(self) -> None:
        for index in range(self.num_products):
            torch.mm(self.input, self.weights[index % len(self.weights)], out=self.output)


def time_side_by_side(products: Products, copies: DeviceCopies, num_copies: int) -> tuple[float, list[float]]:
    """Time of all products, and of the first copy and each that ended before they did."""
    compute, gate = torch.cuda.Stream(), torch.cuda.Stream()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_copies + 1)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(gate):  # keeps both streams waiting until everything is queued
        products.run()
    for stream in (compute, copies.stream):
        stream.wait_stream(gate)
    with torch.cuda.stream(compute):
        begin.record()
        products.run()
        end.record()
    with torch.cuda.stream(copies.stream):
        marks[0].record()
        for mark in marks[1:]:
            copies.copy_block()
            mark.record()
    torch.cuda.synchronize()
    total = begin.elapsed_time(end)
    inside = [i for i in range(num_copies) if i == 0 or begin.elapsed_time(marks[i + 1]) <= total]
    return total, [marks[i].elapsed_time(marks[i + 1]) for i in inside]


def bench_beside_products(copies: DeviceCopies, repetitions: int, report: Report, smallest: bool) -> None:
    """Copies back to back on the copy stream while matrix products run on another."""
    side, scale = (256, 1) if smallest else (8192, 32)
    workloads = {
        # Bound by arithmetic, like a large prefill; bound by reading weights, like a decode step of 32 rows.
        "beside products of a prefill": Products(side, side, side, 2, 4 * scale),
        "beside products of a decode": Products(32, side // 2, 3 * side // 2, 24, 64 * scale),
    }
    for name, products in workloads.items():
        time_side_by_side(products, copies, 1)
        alone, _ = time_side_by_side(products, copies, 0)
        copy_ms = statistics.median(copies.times_ms(copies.copy_block, 5)[0])
        num_copies = int(1.5 * alone / copy_ms) + 2
        slowdowns: list[float] = []
        times: list[float] = []
        for _ in range(repetitions):  # in turns: the clock of a busy device drifts
            alone, _ = time_side_by_side(products, copies, 0)
            total, inside = time_side_by_side(products, copies, num_copies)
            slowdowns.append((total / alone - 1) * 100)
            times += inside
        report.add(name, "one pinned block", copies.adapter, times, slowdown_percent=slowdowns)


def bench_adapter(adapter: Adapter, repetitions: int, report: Report, whole: bool, smallest: bool) -> None:
    adapter.write()
    bench_files(adapter, repetitions, report)
    if whole:
        bench_digests(adapter, repetitions, report)
    if not torch.cuda.is_available():
        print("skipped: host to device, file to device, beside matrix products (no CUDA device here)")
        return
    copies = DeviceCopies(adapter)
    bench_copies(copies, repetitions, report, all_providers=whole)
    bench_end_to_end(copies, repetitions, report)
    if whole:
        bench_beside_products(copies, repetitions, report, smallest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="one tiny adapter, nothing is written")
    parser.add_argument("--folder", type=Path, help="where the adapter files are put (default: the system's)")
    args = parser.parse_args()
    report = Report()
    repetitions = 1 if args.smallest else 25
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for lora_rank in (1,) if args.smallest else (16, 64):
            path = Path(folder) / f"rank_{lora_rank}.safetensors"
            adapter = Adapter(lora_rank, 2 if args.smallest else 36, path)
            bench_adapter(adapter, repetitions, report, lora_rank != 64, args.smallest)
    if not args.smallest:
        print(f"appended to {append_rows('adapter_load', report.rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
