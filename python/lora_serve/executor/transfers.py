"""Does the copies that plans order between the tiers, and says what became of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.common.errors import InternalError
from lora_serve.executor.host_pages import HostPages

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan

logger = logging.getLogger(__name__)

WRITE_BACK = 0
"""In `transfer_kinds`: from the device to the host."""
LOAD_BACK = 1
"""In `transfer_kinds`: from the host to the device."""
_KIND_NAMES = {WRITE_BACK: "write-back", LOAD_BACK: "load-back"}


@dataclass(frozen=True)
class Transfer:
    """One copy between the tiers.

    Parameters
    ----------
    transfer_id : int
        The scheduler's.
    kind : int
        WRITE_BACK or LOAD_BACK.
    source_pages, destination_pages : numpy.ndarray
        [N] int32 page ids, of the source's and the destination's tier.
    """

    transfer_id: int
    kind: int
    source_pages: npt.NDArray[np.int32]
    destination_pages: npt.NDArray[np.int32]


def transfers_of(plan: ExecutionPlan, num_device_pages: int, num_host_pages: int) -> list[Transfer]:
    """A plan's copies, in the plan's order.

    Raises
    ------
    InternalError
        The plan's arrays do not fit together, or a kind or page id does not exist.
    """
    ids, kinds, offsets = (
        plan.transfer_ids.tolist(),
        plan.transfer_kinds.tolist(),
        plan.transfer_offsets.tolist(),
    )
    sources, destinations = plan.transfer_source_pages, plan.transfer_destination_pages
    num_pairs = offsets[-1] if offsets else -1
    if (
        (len(kinds), len(offsets)) != (len(ids), len(ids) + 1)
        or (len(sources), len(destinations)) != (num_pairs, num_pairs)
        or offsets != sorted(offsets)
        or offsets[0] != 0
    ):
        raise InternalError(
            f"plan {plan.plan_id} has {len(ids)} transfers with {len(kinds)} kinds, offsets {offsets}, "
            f"{len(sources)} source and {len(destinations)} destination pages"
        )
    transfers = []
    for transfer_id, kind, begin, end in zip(ids, kinds, offsets[:-1], offsets[1:], strict=True):
        transfer = Transfer(transfer_id, kind, sources[begin:end], destinations[begin:end])
        _check(transfer, plan.plan_id, num_device_pages, num_host_pages)
        transfers.append(transfer)
    return transfers


def _check(transfer: Transfer, plan_id: int, num_device_pages: int, num_host_pages: int) -> None:
    if transfer.kind not in _KIND_NAMES:
        raise InternalError(f"plan {plan_id}: transfer {transfer.transfer_id} has the kind {transfer.kind}")
    limits = (num_device_pages, num_host_pages)
    source_limit, destination_limit = limits if transfer.kind == WRITE_BACK else limits[::-1]
    for what, pages, limit in (
        ("source", transfer.source_pages, source_limit),
        ("destination", transfer.destination_pages, destination_limit),
    ):
        if len(pages) and (pages.min() < 0 or pages.max() >= limit):
            raise InternalError(
                f"plan {plan_id}: {_KIND_NAMES[transfer.kind]} {transfer.transfer_id} names {what} pages "
                f"{pages.min()} to {pages.max()} but page ids of that tier are in [0, {limit})"
            )


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
    """Copies pages between the tiers, in the order of the plans.

    Starting and reporting are apart, because the plan that orders a copy and the result that reports it need
    not be the same. Here a copy is over when `start` returns; one that runs beside the steps on a copy stream
    would be reported by the first `take_reports` after its end. Either way a destination is not read before
    its report, and both ends of a copy stay as they are until then.

    Parameters
    ----------
    host_pages : HostPages
        The host tier.
    num_device_pages : int
        Device page ids are in [0, num_device_pages).
    """

    def __init__(self, host_pages: HostPages, num_device_pages: int) -> None:
        self._host_pages = host_pages
        self._num_device_pages = num_device_pages
        self._reports = TransferReports()

    def start(self, plan: ExecutionPlan) -> None:
        """Begin a plan's copies, before its rows run.

        Raises
        ------
        InternalError
            As `transfers_of`; nothing is copied then.

        Notes
        -----
        A copy that fails does so alone, whatever the type of its error: its request recomputes what the copy
        should have brought. It is logged and reported.
        """
        for transfer in transfers_of(plan, self._num_device_pages, self._host_pages.num_pages):
            try:
                copy = self._copy_of(transfer.kind)
                copy(_to_index(transfer.source_pages), _to_index(transfer.destination_pages))
            except Exception as error:
                kind = _KIND_NAMES[transfer.kind]
                logger.exception(
                    "%s %d of %d KV pages failed; the tokens are computed again where they are needed",
                    kind,
                    transfer.transfer_id,
                    len(transfer.source_pages),
                )
                self._reports.failed[transfer.transfer_id] = f"{type(error).__name__}: {error}"
            else:
                self._reports.completed.append(transfer.transfer_id)

    def take_reports(self) -> TransferReports:
        """Give the copies that have ended since the last call; each is reported once."""
        reports, self._reports = self._reports, TransferReports()
        return reports

    def close(self) -> None:
        """Drop the host tier's memory; no plan may follow."""
        self._host_pages.close()

    def _copy_of(self, kind: int) -> Callable[[Tensor, Tensor], None]:
        return self._host_pages.write_back if kind == WRITE_BACK else self._host_pages.load_back


def _to_index(pages: npt.NDArray[np.int32]) -> Tensor:
    # A copy: torch takes no arrays that are read-only, as the plan's are.
    return torch.from_numpy(pages.astype(np.int64))
