"""The copies between the tiers that a plan orders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lora_serve.common.errors import InternalError

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan

WRITE_BACK = 0
"""In `transfer_kinds`: from the device to the host."""
LOAD_BACK = 1
"""In `transfer_kinds`: from the host to the device."""
KIND_NAMES = {WRITE_BACK: "write-back", LOAD_BACK: "load-back"}


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
        [N] int32 page ids, of the source's and the destination's tier; destinations all different. Parts of
        the plan's arrays.
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
    if transfer.kind not in KIND_NAMES:
        raise InternalError(f"plan {plan_id}: transfer {transfer.transfer_id} has the kind {transfer.kind}")
    limits = (num_device_pages, num_host_pages)
    source_limit, destination_limit = limits if transfer.kind == WRITE_BACK else limits[::-1]
    for what, pages, limit in (
        ("source", transfer.source_pages, source_limit),
        ("destination", transfer.destination_pages, destination_limit),
    ):
        if len(pages) and (pages.min() < 0 or pages.max() >= limit):
            raise InternalError(
                f"plan {plan_id}: {KIND_NAMES[transfer.kind]} {transfer.transfer_id} names {what} pages "
                f"{pages.min()} to {pages.max()} but page ids of that tier are in [0, {limit})"
            )
