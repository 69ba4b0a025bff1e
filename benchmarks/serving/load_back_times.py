"""How fast an engine's load-backs are, beside one plain copy of as many bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from lora_serve.engine.engine_core import EngineCore
from lora_serve.executor.page_copies import PageCopy
from lora_serve.executor.transfer_orders import LOAD_BACK, Transfer

_PLAIN_BYTES = 512 << 20
_PLAIN_REPETITIONS = 5


class LoadBackTimes:
    """Stands before an engine's page copies and takes the times of the load-backs.

    On CUDA by events on the stream of the load-backs: from when all steps before are over to the last byte.
    It reaches into the executor, which has no other use for the times.

    Parameters
    ----------
    core
        An engine with a host tier.
    """

    def __init__(self, core: EngineCore) -> None:
        self._transfers = core._executor._transfers
        self._copies = self._transfers._copies
        self._host_block = self._transfers._host_pages.block
        self._stream: torch.cuda.Stream | None = getattr(self._copies, "_load_backs", None)
        self._page_bytes = self._host_block[0].nbytes
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._host_s = 0.0
        self.num_load_backs = 0
        self.num_bytes = 0
        self._transfers._copies = self

    def start(self, transfers: Sequence[Transfer]) -> list[PageCopy]:
        """As `PageCopies.start`."""
        load_backs = [transfer for transfer in transfers if transfer.kind == LOAD_BACK]
        if not load_backs:
            return self._copies.start(transfers)
        self.num_load_backs += len(load_backs)
        self.num_bytes += sum(len(transfer.source_pages) for transfer in load_backs) * self._page_bytes
        if self._stream is None:
            begin = time.perf_counter()
            started = self._copies.start(transfers)
            self._host_s += time.perf_counter() - begin
            return started
        self._stream.wait_event(torch.cuda.current_stream().record_event())
        begin_event = self._stream.record_event(torch.cuda.Event(enable_timing=True))
        started = self._copies.start(transfers)
        end_event = self._stream.record_event(torch.cuda.Event(enable_timing=True))
        self._events.append((begin_event, end_event))
        return started

    def close(self) -> None:
        """As `PageCopies.close`."""
        self._copies.close()

    def clear(self) -> None:
        """Forget what was counted; no load-back may run."""
        self._events, self._host_s, self.num_load_backs, self.num_bytes = [], 0.0, 0, 0

    def gb_per_s(self) -> float:
        """Of all load-backs together; 0 = there was none. No load-back may run."""
        for _, end in self._events:
            end.synchronize()
        took_s = self._host_s + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        return self.num_bytes / took_s / 1e9 if took_s else 0.0

    def plain_gb_per_s(self) -> float:
        """The best of some copies of neighbouring pages to memory of the device; the engine must be idle."""
        pages = self._host_block[: max(1, _PLAIN_BYTES // self._page_bytes)]
        destination = torch.empty_like(pages, device="cpu" if self._stream is None else "cuda")
        best_s = float("inf")
        for _ in range(_PLAIN_REPETITIONS):
            begin = time.perf_counter()
            destination.copy_(pages, non_blocking=True)
            if self._stream is not None:
                torch.cuda.synchronize()
            best_s = min(best_s, time.perf_counter() - begin)
        return pages.nbytes / best_s / 1e9
