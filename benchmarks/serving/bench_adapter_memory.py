"""What lora_serve itself takes to bring an adapter from disk to the host pool, and from there to the device.

The adapter has Qwen3-8B's shape: all seven projections of 36 layers, bf16. Its file lies in the page cache.
Measured: the whole of `AdapterReader.read` (check, room, read with digest) with several numbers of threads,
and how long another thread of the same process had to wait for the interpreter meanwhile;
`DeviceAdapters.load` until the copy is over, beside a plain copy of as many pinned bytes in the same run. On
a machine without CUDA the device is the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lora_serve.lora.adapter_copies import AdapterCopies, CpuCopies, CudaCopies
from lora_serve.lora.adapter_reader import AdapterReader, HostAdapter
from lora_serve.lora.device_adapters import DeviceAdapters
from lora_serve.lora.host_pool import HostPool
from lora_serve.lora.peft_modules import AdapterLimits
from lora_serve.lora.sources import AdapterSources
from lora_serve.models.config import read_model_config
from lora_serve.models.decoder import DecoderModel
from lora_serve.testing.adapters import make_random_adapter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import append_rows
from timing import percentiles, wall_times_ms

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


class InterpreterWatch:
    """A thread that wants the interpreter every 0.1 ms, as a step loop does, and notes how late it comes."""

    def __init__(self) -> None:
        self.waits_ms: list[float] = []
        self._is_over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()

    def _run(self) -> None:
        while not self._is_over.is_set():
            due = time.perf_counter() + 1e-4
            time.sleep(1e-4)
            self.waits_ms.append((time.perf_counter() - due) * 1e3)


class Report:
    """Collects the rows and prints each as it comes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(
        self, workload: str, adapter: HostAdapter, num_threads: int, times_ms: list[float], **more: object
    ) -> None:
        p20, p50, p80 = percentiles(times_ms)
        row: dict[str, object] = {
            "workload": workload,
            "num_threads": num_threads,
            "lora_rank": adapter.lora_rank,
            "num_bytes": adapter.num_bytes,
            "p20_ms": round(p20, 3),
            "p50_ms": round(p50, 3),
            "p80_ms": round(p80, 3),
            "p50_gb_per_s": round(adapter.num_bytes / p50 / 1e6, 2),
            "check_ms": "",
            "interpreter_wait_p99_ms": "",
            "interpreter_wait_max_ms": "",
            "calling_thread_ms": "",
            "repetitions": len(times_ms),
            **more,
        }
        self.rows.append(row)
        print(*(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)


def bench_reads(
    reader: AdapterReader, path: Path, num_threads: int, repetitions: int, report: Report
) -> None:
    check_ms: list[float] = []

    def read() -> None:
        adapter = reader.read(str(path))
        check_ms.append(adapter.load_ms["check"])
        adapter.release()

    watch = InterpreterWatch()
    with watch.running():
        times_ms = wall_times_ms(read, repetitions)
    waits = sorted(watch.waits_ms)
    adapter = reader.read(str(path))
    report.add(
        "page cache to host pool",
        adapter,
        num_threads,
        times_ms,
        check_ms=round(statistics.median(check_ms), 3),
        interpreter_wait_p99_ms=round(waits[int(len(waits) * 0.99)], 3),
        interpreter_wait_max_ms=round(waits[-1], 3),
    )
    adapter.release()


def bench_loads(
    model: DecoderModel,
    adapter: HostAdapter,
    pool: HostPool,
    device: torch.device,
    repetitions: int,
    report: Report,
) -> None:
    copies: AdapterCopies = CudaCopies(device) if device.type == "cuda" else CpuCopies()
    memory_bytes = 2 * adapter.num_bytes
    residents = DeviceAdapters(model.lora_targets(), torch.bfloat16, device, memory_bytes, copies)
    held = adapter.block
    assert held is not None
    pool.keep(1, held)
    calling_ms: list[float] = []

    def load() -> None:
        block = pool.lease(1)
        assert block is not None
        begin = time.perf_counter()
        residents.load(1, 0, adapter.layout, block)
        calling_ms.append((time.perf_counter() - begin) * 1e3)
        while not residents.release_blocks():
            pass
        residents.evict(1)

    times_ms = wall_times_ms(load, repetitions)
    source = held.tensor
    target = torch.empty(adapter.num_bytes, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    report.add("plain copy of as many bytes", adapter, 1, wall_times_ms(copy, repetitions))
    calling_thread_ms = round(statistics.median(calling_ms), 3)
    report.add("host pool to device", adapter, 1, times_ms, calling_thread_ms=calling_thread_ms)
    assert bool((target == source.to(device)).all())
    residents.close()


def bench_rank(
    model: DecoderModel, path: Path, lora_rank: int, options: argparse.Namespace, report: Report
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_bytes = 2 * sum(file.stat().st_size for file in path.iterdir())
    limits = AdapterLimits(max_lora_rank=lora_rank, dtype=torch.bfloat16)
    pool = HostPool(num_bytes, is_pinned=device.type == "cuda")
    for num_threads in options.threads:
        reader = AdapterReader(
            model.lora_targets(),
            model.fused_lora_targets(),
            limits,
            pool,
            AdapterSources(),
            num_threads=num_threads,
        )
        bench_reads(reader, path, num_threads, options.repetitions, report)
        if num_threads == options.threads[-1]:
            bench_loads(model, reader.read(str(path)), pool, device, options.repetitions, report)
        reader.close()
    pool.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="one repetition of a small adapter; no rows")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument(
        "--folder", type=Path, help="where the adapters' files go (default: a temporary folder)"
    )
    options = parser.parse_args()
    config = dict(QWEN3_8B)
    if options.smallest:
        config.update(num_hidden_layers=2, hidden_size=256, intermediate_size=512, vocab_size=512)
        options.ranks, options.repetitions = [16], 2
    report = Report()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        model = DecoderModel(read_model_config(Path(folder)), device=torch.device("meta"))
        for lora_rank in options.ranks:
            path = Path(folder) / f"rank-{lora_rank}"
            make_random_adapter(path, config, rank=lora_rank, dtype=torch.bfloat16)
            bench_rank(model, path, lora_rank, options, report)
    if not options.smallest:
        print(f"appended to {append_rows('adapter_memory', report.rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
