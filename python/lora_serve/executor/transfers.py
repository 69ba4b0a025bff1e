"""Does the copies that plans order between the tiers, and says what became of them."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_serve.executor.host_pages import HostPages
from lora_serve.executor.memcpy_batch import MemcpyBatch
from lora_serve.executor.page_copies import CpuPageCopies, CudaPageCopies, PageCopies, PageCopy
from lora_serve.executor.transfer_orders import KIND_NAMES, Transfer, transfers_of

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransferReports:
    """What became of copies.

    Parameters
    ----------
    completed : list of int
        Ids of copies that are done: their destination may be read.
    failed : dict from int to str
        Ids of copies that did not happen, each with the reason.
    """

    completed: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)


class PageTransfers:
    """Copies pages between the tiers, beside the steps where the device can.

    Starting and reporting are apart: a copy is reported by the first `take_reports` after its end, which may
    be that of a later plan. Nobody reads a destination before its report, and both ends of a copy stay as
    they are until then. One thread, the one that submits the steps, calls everything.

    Parameters
    ----------
    host_pages : HostPages
        The host tier; closed with this.
    num_device_pages : int
        Device page ids are in [0, num_device_pages).
    copies : PageCopies
        The copies between the two; closed with this.
    """

    def __init__(self, host_pages: HostPages, num_device_pages: int, copies: PageCopies) -> None:
        self._host_pages = host_pages
        self._num_device_pages = num_device_pages
        self._copies = copies
        # By kind, because each ends in its own order, in which they are asked for: one that runs hides the
        # later ones of its kind alone.
        self._under_way: dict[int, deque[tuple[Transfer, PageCopy]]] = {kind: deque() for kind in KIND_NAMES}

    def start(self, plan: ExecutionPlan) -> None:
        """Begin a plan's copies, before its rows run.

        Raises
        ------
        InternalError
            As `transfers_of`; nothing is copied then.

        Notes
        -----
        Waits for nothing, where the host tier is page-locked. On the CPU all copies are over on return.
        """
        transfers = transfers_of(plan, self._num_device_pages, self._host_pages.num_pages)
        for transfer, copy in zip(transfers, self._copies.start(transfers), strict=True):
            self._under_way[transfer.kind].append((transfer, copy))

    def take_reports(self) -> TransferReports:
        """Give the copies that have ended since the last call, without waiting; each is reported once.

        A copy that fails does so alone, whatever the type of its error: its request recomputes what the copy
        should have brought. It is logged and reported, when nothing of it is on its way any more.
        """
        reports = TransferReports()
        for queue in self._under_way.values():
            while queue and queue[0][1].is_done():
                _report(*queue.popleft(), reports)
        return reports

    def close(self) -> None:
        """Wait for the copies that run, and drop the host tier's memory; no plan may follow."""
        self._copies.close()
        for queue in self._under_way.values():
            queue.clear()
        self._host_pages.close()


def make_page_transfers(
    pool: Tensor, num_host_pages: int, execution_stream: torch.cuda.Stream | None = None
) -> PageTransfers:
    """Allocate the host tier and give the copies between it and the device.

    Parameters
    ----------
    pool : Tensor
        [P, num_layers, 2, G, kv_heads, D]: the device's pages; see `allocate_kv_pool`.
    num_host_pages : int
        >= 0; 0 = there is no host tier, and no plan orders a copy.
    execution_stream : torch.cuda.Stream or None
        The stream that runs the steps; None = whatever is current at each `start`. On the CPU it means
        nothing.

    Raises
    ------
    InvalidArgumentError
        The machine does not give the host tier's memory.
    """
    host_pages = HostPages(num_host_pages, pool)
    copies: PageCopies
    if pool.is_cuda:
        batch = MemcpyBatch.find(pool.device) if num_host_pages > 0 else None
        copies = CudaPageCopies(pool, host_pages.block, execution_stream, batch=batch)
    else:
        copies = CpuPageCopies(pool, host_pages.block)
    return PageTransfers(host_pages, len(pool), copies)


def _report(transfer: Transfer, copy: PageCopy, reports: TransferReports) -> None:
    error = copy.error
    if error is None:
        reports.completed.append(transfer.transfer_id)
        return
    logger.error(
        "%s %d of %d KV pages failed; the tokens are computed again where they are needed",
        KIND_NAMES[transfer.kind],
        transfer.transfer_id,
        len(transfer.source_pages),
        exc_info=error,
    )
    reports.failed[transfer.transfer_id] = f"{type(error).__name__}: {error}"
