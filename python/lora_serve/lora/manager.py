"""The memory of adapters: host and device behind one name, and what is handed from one thread to the other.

The scheduler decides which adapter is in which slot and when; the manager carries it out. Reading and keeping
adapters on the host is the engine's thread's matter (:mod:`~lora_serve.lora.host_adapters`), what is on the
device that of the thread that runs the steps (:mod:`~lora_serve.lora.device_adapters`).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.layers.linear import LoRATarget
from lora_serve.lora.adapter_copies import AdapterCopies, CpuCopies, CudaCopies
from lora_serve.lora.adapter_layout import AdapterLayout
from lora_serve.lora.adapter_reader import AdapterReader, HostAdapter, describe_error, never
from lora_serve.lora.device_adapters import DeviceAdapters
from lora_serve.lora.eviction_order import AdapterLine
from lora_serve.lora.host_adapters import HostAdapters, HostNews, HostResidency
from lora_serve.lora.host_block import HostBlock
from lora_serve.lora.host_pool import HostPool
from lora_serve.lora.peft_modules import AdapterLimits
from lora_serve.lora.sources import AdapterSources

NO_SLOT = -1


class AdapterResidency(NamedTuple):
    """Where one adapter's weights are; made by the thousand between two steps, so cheap to make.

    Parameters
    ----------
    adapter_id
        Its generation.
    adapter_slot
        Its row in the device tables, -1 = not on the device.
    host
        What host memory knows of it.
    copy_ms
        How long its last copy to the device took; None = there was none.
    """

    adapter_id: int
    adapter_slot: int
    host: HostResidency
    copy_ms: float | None = None

    @property
    def tier(self) -> Literal["device", "host", "disk"]:
        """The fastest memory that holds its weights: "device", "host" or "disk"."""
        if self.adapter_slot != NO_SLOT:
            return "device"
        return "host" if self.host.is_on_host else "disk"

    @property
    def load_ms(self) -> dict[str, float]:
        """How long each stage of its last load took.

        They are "locate", "check", "room" on the host, "read", and "copy" to the device.
        """
        return {**self.host.load_ms, **({} if self.copy_ms is None else {"copy": self.copy_ms})}


@dataclass
class LoadReports:
    """How the loads of a plan have ended.

    Parameters
    ----------
    loaded
        On the device, in their slots.
    failed
        Not on the device, with the reason.
    """

    loaded: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Staged:
    """An adapter that a plan may load, its block leased."""

    layout: AdapterLayout
    block: HostBlock


class LoRAManager:
    """Adapter memory of one engine.

    Owns: the host pool, the device arena and tables, the loads between them.
    Deliberately does not know: names, requests, which adapter is needed, which may be replaced.
    Invariants: an adapter that `is_on_host` when a plan is made is on the host when `prepare_loads` leases it
    for that plan, because blocks are evicted in `poll` only; every lease ends when its copy has ended.
    Threads: `read` in any; the step loop's calls what stands under "The step loop", the one that runs the
    steps what stands under "The steps". They meet in the staged blocks, which a lock guards.

    Parameters
    ----------
    targets
        Module paths of the model that may have an adapter, as ``DecoderModel.lora_targets()`` gives them.
    fused_targets
        Module paths that stand for several of them, as ``DecoderModel.fused_lora_targets()`` gives them.
    dtype, device
        Of the weights on the device: the model's.
    max_lora_rank
        Largest rank accepted, >= 1.
    memory_bytes, host_memory_bytes
        What adapters may take on the device, and on the host.
    sources
        Where adapters may come from.

    Raises
    ------
    InvalidArgumentError
        ``max_lora_rank`` is below 1, or the machine does not give that much memory.
    """

    def __init__(
        self,
        targets: Mapping[str, LoRATarget],
        fused_targets: Mapping[str, tuple[str, ...]],
        dtype: torch.dtype,
        device: torch.device | str,
        max_lora_rank: int,
        *,
        memory_bytes: int,
        host_memory_bytes: int,
        sources: AdapterSources,
    ) -> None:
        if max_lora_rank < 1:
            raise InvalidArgumentError(f"max_lora_rank is {max_lora_rank}, expected at least 1")
        device = torch.device(device)
        is_cuda = device.type == "cuda"
        copies: AdapterCopies = CudaCopies(device) if is_cuda else CpuCopies()
        self._device = DeviceAdapters(
            targets, dtype, device, memory_bytes, copies, max_lora_rank=max_lora_rank
        )
        self._wake: Callable[[], None] = lambda: None
        self._pool = HostPool(host_memory_bytes, is_pinned=is_cuda, on_room_wanted=self._on_news)
        limits = AdapterLimits(max_lora_rank=max_lora_rank, dtype=dtype)
        self._reader = AdapterReader(targets, fused_targets, limits, self._pool, sources)
        self._host = HostAdapters(self._reader, self._pool, self._on_news)
        self._lock = threading.Lock()
        self._staged: dict[int, _Staged] = {}  # What plans load that were submitted and have not begun.
        self._copy_ms: dict[int, float] = {}

    # --- Any thread ---------------------------------------------------------------------------------------

    def read(
        self, path: str, name: str | None = None, is_cancelled: Callable[[], bool] = never
    ) -> HostAdapter:
        """Find, read and validate an adapter; see `AdapterReader.read`."""
        adapter = self._reader.read(path, name, is_cancelled)
        try:
            return dataclasses.replace(adapter, description=self._device.describe(adapter.layout))
        except BaseException:
            adapter.release()
            raise

    # --- The step loop ------------------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        """Bytes that adapters may take on the device, as `charged_bytes` counts them."""
        return self._device.memory_bytes

    @property
    def num_reads_under_way(self) -> int:
        """How many adapters are being read again."""
        return self._host.num_reads_under_way

    @property
    def num_load_waits(self) -> int:
        """How often the step loop may have had to wait for a thread that reads adapters."""
        return self._pool.num_lock_waits

    def set_wake(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, from other threads, whenever `poll` has something to do."""
        self._wake = wake

    def charged_bytes(self, adapter: HostAdapter) -> int:
        """What the scheduler has to count for an adapter on the device."""
        return self._device.charged_bytes(adapter.num_bytes)

    def add(self, adapter_id: int, adapter: HostAdapter) -> None:
        """Remember an adapter until :meth:`remove`; see `HostAdapters.add`."""
        self._host.add(adapter_id, adapter)
        if adapter.description is not None:
            self._device.remember(adapter_id, adapter.description)

    def remove(self, adapter_id: int) -> None:
        """Forget an adapter that is not on the device; see `HostAdapters.remove`."""
        self._host.remove(adapter_id)
        self._device.forget_description(adapter_id)
        self._copy_ms.pop(adapter_id, None)
        with self._lock:
            staged = self._staged.pop(adapter_id, None)
        if staged is not None:
            staged.block.release()

    def is_on_host(self, adapter_id: int) -> bool:
        """Whether a plan that is made before the next :meth:`poll` may load it."""
        return self._host.is_on_host(adapter_id)

    def touch(self, adapter_id: int) -> None:
        """A request has come for an adapter: of those that nobody waits for, it will leave the host last."""
        self._host.touch(adapter_id)

    def poll(self, line: AdapterLine | None = None) -> HostNews:
        """Take up what has ended, make room on the host, read ahead; tell what has come to the host or gone.

        Parameters
        ----------
        line
            Who is waited for; None = nobody.
        """
        for adapter_id, copy_ms in self._device.release_blocks().items():
            if adapter_id in self._host:  # Or it was removed while its last copy ended.
                self._copy_ms[adapter_id] = copy_ms
        return self._host.poll(line)

    def prepare_loads(self, adapter_ids: Iterable[int]) -> None:
        """A plan is about to be submitted that loads these: lease their blocks.

        Raises
        ------
        AdapterNotFoundError
            One was not added, or was removed.
        InternalError
            One is not on the host.
        """
        for adapter_id in adapter_ids:
            block = self._host.lease(adapter_id)
            if block is None:
                raise InternalError(
                    f"a plan loads adapter generation {adapter_id}, which is not on the host; "
                    "plans load only what was there at the last poll"
                )
            with self._lock:
                self._staged[adapter_id] = _Staged(self._host.layout(adapter_id), block)

    def snapshot(self) -> list[AdapterResidency]:
        """Where every adapter is, in the order of their numbers."""
        slots, copy_ms = self._device.slots, self._copy_ms
        return [
            AdapterResidency(adapter_id, slots.get(adapter_id, NO_SLOT), host, copy_ms.get(adapter_id))
            for adapter_id, host in self._host.snapshot().items()
        ]

    def close(self) -> None:
        """Wait for the copies that run, end the reads, free the host memory; after the last step."""
        with ExitStack() as rest:  # All of it, also where a device has failed and cannot be waited for.
            for close in (self._pool.close, self._reader.close, self._host.close, self._release_staged):
                rest.callback(close)
            self._device.close()

    def _release_staged(self) -> None:
        with self._lock:
            staged, self._staged = self._staged, {}
        for one in staged.values():
            one.block.release()

    def _on_news(self) -> None:
        self._wake()

    # --- The steps ----------------------------------------------------------------------------------------

    def take_loads(self, slot_of: Mapping[int, int]) -> LoadReports:
        """Bring to the device what the next plan loads; tell how each load has ended.

        Parameters
        ----------
        slot_of
            The loads of the plan, adapter to slot, as `prepare_loads` was told of them.

        Notes
        -----
        One adapter's failure is its own, whatever its type. Rows of the plan that loads it may name its slot
        all the same: then the slot is left without any module, so that they run, and what they give means
        nothing.
        """
        reports = LoadReports()
        for adapter_id, slot in slot_of.items():
            with self._lock:
                staged = self._staged.pop(adapter_id)
            try:
                self._device.load(adapter_id, slot, staged.layout, staged.block)
                reports.loaded.append(adapter_id)
            except Exception as error:  # Out of memory included: the other requests go on.
                reports.failed[adapter_id] = describe_error(error)
                self._device.install_nothing(slot)
        return reports

    def evict(self, adapter_id: int) -> None:
        """Take an adapter off the device; see `DeviceAdapters.evict`."""
        self._device.evict(adapter_id)

    def free(self, adapter_id: int) -> None:
        """Take an adapter off the device if it is there, because it is drained."""
        self._device.forget(adapter_id)

    def adapts_more_than_layers(self, slots: npt.NDArray[np.int32]) -> bool:
        """Whether an adapter in one of these slots has weights beyond the layers; see `DeviceAdapters`."""
        return self._device.adapts_more_than_layers(slots)
