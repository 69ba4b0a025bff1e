"""Paged attention of one layer of Qwen3-8B, and what planning a step costs the host.

Keys and values lie in a page-major pool of many layers, and successive calls read successive layers, so that
they do not come out of the cache. `bytes` are those of the rows' keys and values, read once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from result_file import append_rows
from timing import percentiles

from lora_serve.layers import AttentionMetadata, AttentionSpec, KVLayer, make_attention_backend

SPEC = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, scaling=128**-0.5)
PAGE_SIZE = 16
NUM_LAYERS = 6
# Tokens of this step and tokens in all, of each row.
STEPS = {
    "decode_1x4096": [(1, 4096)],
    "decode_32x256": [(1, 256)] * 32,
    "decode_32x4096": [(1, 4096)] * 32,
    "decode_128x256": [(1, 256)] * 128,
    "decode_128x4096": [(1, 4096)] * 128,
    "decode_128_one_long": [(1, 32768), *[(1, 256)] * 127],
    "prefill_4x2048": [(2048, 2048)] * 4,
    "prefill_512_of_8192": [(512, 8192)],
    "prefill_32_of_8192": [(32, 8192)],
    "mixed_64x1024_2048": [*[(1, 1024)] * 64, (2048, 2048)],
}
SMALLEST = {"smallest": [(1, 20), (5, 9)]}


class Bench:
    """One step's inputs on one device."""

    def __init__(self, lengths: list[tuple[int, int]], device: str, dtype: torch.dtype) -> None:
        query_lens, seq_lens = (np.array(column, dtype=np.int32) for column in zip(*lengths, strict=True))
        indptr = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(-(-seq_lens // PAGE_SIZE), out=indptr[1:])
        num_pages = int(indptr[-1])
        shape = (num_pages, NUM_LAYERS, 2, PAGE_SIZE, SPEC.num_kv_heads, SPEC.head_dim)
        pool = torch.randn(shape, device=device, dtype=dtype)
        self.layers = [KVLayer(pool[:, i, 0], pool[:, i, 1]) for i in range(NUM_LAYERS)]
        pages = torch.randperm(num_pages).to(device, torch.int32)
        table = torch.zeros(len(lengths), int(np.diff(indptr).max()), dtype=torch.int32, device=device)
        for row in range(len(lengths)):
            table[row, : indptr[row + 1] - indptr[row]] = pages[indptr[row] : indptr[row + 1]]
        starts = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
        self.metadata = AttentionMetadata(
            query_start_loc=torch.from_numpy(starts).to(device),
            num_computed_tokens=torch.from_numpy(seq_lens - query_lens).to(device),
            seq_lens=torch.from_numpy(seq_lens).to(device),
            page_table=table,
            host_query_lens=query_lens,
            host_seq_lens=seq_lens,
            page_indices=pages,
            host_page_indptr=indptr,
        )
        self.is_decode = bool((query_lens == 1).all())
        self.num_bytes = 4 * int(seq_lens.sum()) * SPEC.num_kv_heads * SPEC.head_dim
        num_tokens = int(query_lens.sum())
        self.query = torch.randn(num_tokens, SPEC.num_heads, SPEC.head_dim, device=device, dtype=dtype)


def times_us(run: Callable[[KVLayer], object], layers: list[KVLayer], repetitions: int) -> list[float]:
    """Device times of one call, from graph replays over all layers."""
    for layer in layers:
        run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            run(layer)
    graph.replay()
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(layers))
    return times


def host_times_us(plan: Callable[[], object], repetitions: int) -> list[float]:
    """Host times of planning while the device is idle."""
    times = []
    for _ in range(repetitions + 5):
        begin = time.perf_counter()
        plan()
        times.append((time.perf_counter() - begin) * 1e6)
        torch.cuda.synchronize()
    return times[5:]


def measure(name: str, bench: Bench, repetitions: int) -> list[dict[str, object]]:
    from lora_serve.layers.flashinfer_attention import FlashInferAttentionBackend

    rows: list[dict[str, object]] = []

    def add(provider: str, what: str, values: list[float]) -> None:
        p20, p50, p80 = percentiles(values)
        row = {
            "step": name,
            "provider": provider,
            "what": what,
            "p20_us": round(p20, 1),
            "p50_us": round(p50, 1),
            "p80_us": round(p80, 1),
            "gb_per_s": round(bench.num_bytes / p50 / 1e3) if what == "attend" else "",
            "repetitions": repetitions,
        }
        rows.append(row)
        print("  ".join(str(value) for value in row.values()), flush=True)

    providers = [("fa2", False), ("fa2", True)] if bench.is_decode else [("fa3", False), ("fa2", False)]
    for prefill_kernel, launches_early in providers:
        backend = FlashInferAttentionBackend(prefill_kernel, launches_early=launches_early)
        label = prefill_kernel + ("_launched_early" if launches_early else "")
        plan = backend.plan(bench.metadata, bench.layers[0], {SPEC})

        def attend(layer: KVLayer, backend=backend, plan=plan) -> object:
            return backend.attend(bench.query, layer, SPEC, plan)

        add(label, "attend", times_us(attend, bench.layers, repetitions))
        add(
            label,
            "plan",
            host_times_us(lambda b=backend: b.plan(bench.metadata, bench.layers[0], {SPEC}), repetitions),
        )
        if bench.is_decode:
            assert bench.metadata.page_indices is not None
            state = backend.make_decode_graph_state(
                len(bench.query), bench.layers[0], {SPEC}, bench.metadata.page_indices
            )
            state.plan(bench.metadata)

            def attend_fixed(layer: KVLayer, backend=backend, state=state) -> object:
                return backend.attend(bench.query, layer, SPEC, state)

            add(f"{label}_graph", "attend", times_us(attend_fixed, bench.layers, repetitions))
            add(f"{label}_graph", "plan", host_times_us(lambda s=state: s.plan(bench.metadata), repetitions))
    return rows


def run_smallest() -> None:
    """The torch backend on the smallest step: keeps this script from rotting where there is no GPU."""
    bench = Bench(SMALLEST["smallest"], "cpu", torch.float32)
    backend = make_attention_backend("torch")
    plan = backend.plan(bench.metadata, bench.layers[0], {SPEC})
    assert backend.attend(bench.query, bench.layers[0], SPEC, plan).isfinite().all()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="one small step on the CPU; no rows")
    parser.add_argument("--no-save", action="store_true", help="print the rows, do not append them")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--steps", nargs="*", choices=list(STEPS), default=list(STEPS))
    options = parser.parse_args()
    if options.smallest or not torch.cuda.is_available():
        run_smallest()
        return 0
    rows: list[dict[str, object]] = []
    for name in options.steps:
        rows += measure(name, Bench(STEPS[name], "cuda", torch.bfloat16), options.repetitions)
    if not options.no_save:
        append_rows("attention", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
