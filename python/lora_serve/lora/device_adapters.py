"""Adapters on the device: each in an extent of the arena, each with a row of the tables under its slot."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.common.errors import InternalError
from lora_serve.kernels.device_tables import MAX_RANK, DeviceTables, ModulePlace
from lora_serve.layers.linear import LoRAKind, LoRATarget
from lora_serve.lora.adapter_copies import AdapterCopies, PendingCopy
from lora_serve.lora.adapter_layout import BLOCK_ALIGNMENT, AdapterLayout, align
from lora_serve.lora.device_arena import DeviceArena, DeviceExtent
from lora_serve.lora.host_block import HostBlock

MAX_RESIDENT_ADAPTERS = 1024
"""Adapters on the device at once, however small; see `DeviceAdapters.charged_bytes`."""
NUM_SLOTS = 2 * MAX_RESIDENT_ADAPTERS
"""Rows of the tables: a slot is free again only when the plan that reports its adapter's drain has returned,
its bytes when that plan is made."""


@dataclass(frozen=True, eq=False)
class DeviceDescription:
    """What an adapter's layout means for the tables, whatever its slot and place.

    Parameters
    ----------
    row
        Of the tables, as with the adapter's block at the arena's start.
    adapts_more
        It changes more than the decoder's layers.
    """

    row: Tensor
    adapts_more: bool


@dataclass(eq=False)
class _Resident:
    """One adapter that has a slot."""

    slot: int
    extent: DeviceExtent
    description: DeviceDescription


@dataclass(frozen=True, eq=False)
class _Arriving:
    """A copy that runs; its block is held until it is over."""

    adapter_id: int
    copy: PendingCopy
    block: HostBlock


class DeviceAdapters:
    """Which adapters are on the device, in which slots; the copies that bring them there.

    Owns: the arena, the tables, both of which the model's layers are bound to, the host blocks that copies
    read.
    Deliberately does not know: names, files, who is needed, who may be replaced: plans say it.
    Invariants: an adapter has at most one slot and a slot at most one adapter; the tables have rows for
    exactly those; a row is written when its bytes are there or on their way ahead
    of the steps that follow.
    Threads: one, the one that runs the steps, between two of them; any for `describe`, `remember`,
    `forget_description`, `release_blocks`, `slots`, `in`.
    Nothing here waits for a CUDA device.

    Parameters
    ----------
    targets
        Module paths of the model that may have an adapter.
    dtype
        The model's.
    device
        Where.
    memory_bytes
        Size of the arena.
    copies
        The device's copies; closed with this.
    max_lora_rank
        Largest rank of any adapter: kernels size their scratch memory by it.

    Raises
    ------
    InvalidArgumentError
        The device does not have that much memory.
    """

    def __init__(
        self,
        targets: Mapping[str, LoRATarget],
        dtype: torch.dtype,
        device: torch.device | str,
        memory_bytes: int,
        copies: AdapterCopies,
        *,
        max_lora_rank: int = MAX_RANK,
    ) -> None:
        self._targets = dict(targets)
        self._layers = list({id(target.table): target.table for target in targets.values()}.values())
        self._layer_of = {id(layer): index for index, layer in enumerate(self._layers)}
        self._dtype = dtype
        self._copies = copies
        self._arena = DeviceArena(memory_bytes, device, copies)
        self._tables = DeviceTables(
            [layer.num_slices for layer in self._layers], NUM_SLOTS, device, max_rank=max_lora_rank
        )
        for index, layer in enumerate(self._layers):
            layer.bind(self._arena.buffer.view(dtype), self._tables, index)
        self._descriptions: dict[int, DeviceDescription] = {}
        self._residents: dict[int, _Resident] = {}
        # By slot; the last entry is that of rows without an adapter, whose slot is -1.
        self._adapts_more = np.zeros(NUM_SLOTS + 1, dtype=np.bool_)
        self._arriving: list[_Arriving] = []
        self._arriving_lock = threading.Lock()
        self._min_charge = align(-(-memory_bytes // MAX_RESIDENT_ADAPTERS), BLOCK_ALIGNMENT)

    @property
    def memory_bytes(self) -> int:
        """Bytes that adapters may take together."""
        return self._arena.num_bytes

    @property
    def num_free_bytes(self) -> int:
        """Bytes of the arena that no adapter takes."""
        return self._arena.num_free_bytes

    @property
    def slots(self) -> dict[int, int]:
        """Slot of each adapter that is on the device; a copy, from any thread."""
        return {adapter_id: resident.slot for adapter_id, resident in self._residents.copy().items()}

    def adapts_more_than_layers(self, slots: npt.NDArray[np.int32]) -> bool:
        """Whether any of these slots' adapters changes the token embedding or the projection to logits.

        Parameters
        ----------
        slots
            Each in [-1, NUM_SLOTS); -1 = no adapter.
        """
        return bool(self._adapts_more[slots].any())

    def charged_bytes(self, num_bytes: int) -> int:
        """What the scheduler counts for an adapter of this size.

        Its exact bytes, rounded up to ``BLOCK_ALIGNMENT``; at least so much that no more than
        ``MAX_RESIDENT_ADAPTERS`` fit, because each takes a row of the tables, too.
        """
        return max(align(num_bytes, BLOCK_ALIGNMENT), self._min_charge)

    def describe(self, layout: AdapterLayout) -> DeviceDescription:
        """Work out what a layout means for the tables, which takes a millisecond; from any thread."""
        size = self._dtype.itemsize
        places = []
        adapts_more = False
        for module in layout.modules:
            target = self._targets[module.module]
            adapts_more |= target.kind is not LoRAKind.LINEAR
            layer = self._layer_of[id(target.table)]
            a_offset, b_offset = module.a_offset // size, module.b_offset // size
            places.append(
                ModulePlace(layer, target.slice_index, a_offset, b_offset, module.lora_rank, module.scaling)
            )
        return DeviceDescription(self._tables.make_row(places), adapts_more)

    def remember(self, adapter_id: int, description: DeviceDescription) -> None:
        """Keep an adapter's description, so that a load need not work it out; from any thread."""
        self._descriptions[adapter_id] = description

    def forget_description(self, adapter_id: int) -> None:
        """Drop the description of an adapter that does not come again; from any thread."""
        self._descriptions.pop(adapter_id, None)

    def load(self, adapter_id: int, slot: int, layout: AdapterLayout, block: HostBlock) -> None:
        """Bring an adapter to the device, ready for every step that is submitted after this.

        Parameters
        ----------
        adapter_id
            One that is not on the device.
        slot
            A free slot.
        layout
            Of the block.
        block
            Its weights, leased; released here when the copy is over, or has failed.

        Raises
        ------
        InternalError
            The slot is taken or out of range, the adapter is on the device, or its bytes do not fit.
        """
        try:
            self._check_free(adapter_id, slot)
            description = self._descriptions.get(adapter_id)
            if description is None:
                description = self._descriptions[adapter_id] = self.describe(layout)
            extent = self._place(layout.num_bytes)
            try:
                copy = self._arena.load(extent, block.tensor)
                self._arena.join(extent)
                if copy.is_done() and copy.error is not None:
                    raise copy.error
            except BaseException:
                self._arena.free(extent)
                raise
        except BaseException:
            block.release()
            raise
        with self._arriving_lock:
            self._arriving.append(_Arriving(adapter_id, copy, block))
        resident = _Resident(slot, extent, description)
        self._residents[adapter_id] = resident
        self._write(resident)

    def release_blocks(self) -> dict[int, float]:
        """Let go of the host blocks whose copies are over; for any thread.

        Returns
        -------
        dict
            Milliseconds that each of these copies took, by adapter.

        Raises
        ------
        InternalError
            A copy has failed although it was well begun: the device is broken, and a step may have read it.
        """
        with self._arriving_lock:
            done = [arriving for arriving in self._arriving if arriving.copy.is_done()]
            self._arriving = [arriving for arriving in self._arriving if arriving not in done]
        for arriving in done:
            arriving.block.release()
        times = {}
        for arriving in done:
            if arriving.copy.error is not None:
                raise InternalError(
                    f"the copy of adapter generation {arriving.adapter_id} to the device failed: "
                    f"{arriving.copy.error}"
                )
            times[arriving.adapter_id] = arriving.copy.copy_ms or 0.0
        return times

    def install_nothing(self, slot: int) -> None:
        """Let a slot whose adapter could not be loaded have no module anywhere.

        Then a step with rows that name it runs; whoever calls this must not use what they give. A slot that
        another adapter has stays as it is, and one that does not exist is nothing.
        """
        if not 0 <= slot < NUM_SLOTS or slot in self.slots.values():
            return
        self._copies.write_row(self._tables.rows[slot], self._tables.make_row(()))

    def evict(self, adapter_id: int) -> None:
        """Take an adapter off the device.

        Raises
        ------
        InternalError
            It is not on the device.
        """
        resident = self._residents.pop(adapter_id, None)
        if resident is None:
            raise InternalError(f"adapter generation {adapter_id} is evicted but is in no slot")
        self._arena.free(resident.extent)
        self._empty(resident.slot)

    def forget(self, adapter_id: int) -> None:
        """Take an adapter off the device if it is there; it will not come again."""
        if adapter_id in self._residents:
            self.evict(adapter_id)
        self.forget_description(adapter_id)

    def __contains__(self, adapter_id: int) -> bool:
        """Whether the adapter has a slot."""
        return adapter_id in self._residents

    def close(self) -> None:
        """Wait for the copies that run, and release their blocks."""
        self._copies.close()
        with self._arriving_lock:
            arrived, self._arriving = self._arriving, []
        for arriving in arrived:
            arriving.block.release()

    # --- One adapter --------------------------------------------------------------------------------------

    def _check_free(self, adapter_id: int, slot: int) -> None:
        if not 0 <= slot < NUM_SLOTS:
            raise InternalError(
                f"adapter generation {adapter_id} is loaded to slot {slot}, expected 0 to {NUM_SLOTS - 1}"
            )
        if adapter_id in self._residents or slot in self.slots.values():
            raise InternalError(
                f"adapter generation {adapter_id} is loaded to slot {slot}, but has a slot or that one is "
                f"taken: {self.slots}"
            )

    def _place(self, num_bytes: int) -> DeviceExtent:
        placement = self._arena.place(num_bytes, joins_loads=True)
        for resident in self._residents.values():
            if resident.extent in placement.moved:
                self._write(resident)
        assert placement.extent is not None  # Loads were joined, so that none stood in the way.
        return placement.extent

    def _write(self, resident: _Resident) -> None:
        """Let the slot stand for the adapter at its present place, as a whole."""
        start = resident.extent.offset // self._dtype.itemsize
        row = self._tables.row_at(resident.description.row, start)
        self._copies.write_row(self._tables.rows[resident.slot], row)
        self._adapts_more[resident.slot] = resident.description.adapts_more

    def _empty(self, slot: int) -> None:
        """Let the slot stand for no adapter."""
        self._copies.write_row(self._tables.rows[slot], self._tables.empty_row)
        self._adapts_more[slot] = False
