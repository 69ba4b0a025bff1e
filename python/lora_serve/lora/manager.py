"""Reads adapters into host memory and installs them in the layers' tables, by generation number.

The scheduler decides which adapter is in which slot and when; the manager carries it out. Here the device
tier is plain tensors, one pair a module.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_serve.common.errors import AdapterNotFoundError, InternalError, InvalidArgumentError
from lora_serve.kernels.lora_weights import LoRALayerTable, LoRALayerWeights, LoRASliceWeights
from lora_serve.layers.linear import LoRATarget
from lora_serve.lora.allowed_roots import AllowedRoots
from lora_serve.lora.peft_adapter import AdapterLimits, HostAdapter, read_peft_adapter

NO_SLOT = -1


@dataclass(frozen=True)
class AdapterResidency:
    """Where one adapter's weights are.

    Parameters
    ----------
    adapter_id
        Its generation.
    adapter_slot
        Its row in the layers' tables, -1 = in host memory only.
    num_bytes
        Bytes of its weights in the model's dtype.
    lora_rank
        Its largest rank.
    target_modules
        Last components of its module paths, sorted.
    """

    adapter_id: int
    adapter_slot: int
    num_bytes: int
    lora_rank: int
    target_modules: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _TableLayout:
    """A packed layer's table and the module path of each of its slices, None where no target names it."""

    table: LoRALayerTable
    modules: tuple[str | None, ...]


class LoRAManager:
    """Host copies and device tables of adapters.

    Owns: the host copy of each adapter that was added, and every entry of the targets' tables.
    Deliberately does not know: names, requests, which adapter is needed, which may be replaced.
    Invariants: a slot holds at most one adapter and an adapter at most one slot; all tables have an entry for
    exactly the slots in use; what is removed is referenced by nothing here.
    Threads: ``read`` may run in any thread. One thread, the one that runs the steps, changes what is on the
    device, between two steps: ``install``, ``evict``, and ``remove`` of an adapter that has a slot. Another,
    the step loop's, may meanwhile ``add``, ``remove`` an adapter that was never installed, ask ``in`` and
    take a ``snapshot``. A lock guards the two maps that both use, for single look-ups only; the tables, which
    the kernels read, belong to the first thread.

    Parameters
    ----------
    targets
        Module paths of the model that may have an adapter, as ``DecoderModel.lora_targets()`` gives them.
    dtype, device
        Of the installed weights: the model's.
    max_lora_rank
        Largest rank accepted, >= 1.
    allowed_roots
        Folders that adapters may come from; None = any.

    Raises
    ------
    InvalidArgumentError
        ``max_lora_rank`` is below 1, or a root is not a folder.
    """

    def __init__(
        self,
        targets: Mapping[str, LoRATarget],
        dtype: torch.dtype,
        device: torch.device | str,
        max_lora_rank: int,
        allowed_roots: Sequence[str] | None = None,
    ) -> None:
        if max_lora_rank < 1:
            raise InvalidArgumentError(f"max_lora_rank is {max_lora_rank}, expected at least 1")
        self._targets = dict(targets)
        self._layouts = _table_layouts(self._targets)
        self._limits = AdapterLimits(max_lora_rank=max_lora_rank, dtype=dtype)
        self._device = torch.device(device)
        self._allowed_roots = AllowedRoots(allowed_roots)
        self._lock = threading.Lock()
        self._host: dict[int, HostAdapter] = {}
        self._slot_of: dict[int, int] = {}

    @property
    def is_staged(self) -> bool:
        """True: every adapter that was added lies in host memory, so that an install takes effect at once."""
        return True

    def read(self, path: str, name: str | None = None) -> HostAdapter:
        """Read and validate a PEFT directory; the slow part of a load, safe in any thread.

        Parameters
        ----------
        path
            The directory that PEFT's ``save_pretrained`` wrote.
        name
            How messages name the adapter; its path where None.

        Raises
        ------
        InvalidArgumentError
            The path is outside the allowed roots, or the adapter cannot be read or applied exactly.
        """
        return read_peft_adapter(
            path, self._targets, self._limits, name=name, resolve=self._allowed_roots.resolve
        )

    def add(self, adapter_id: int, adapter: HostAdapter) -> None:
        """Keep an adapter's host copy until :meth:`remove`.

        Raises
        ------
        InternalError
            ``adapter_id`` is below 1 or was added before, or the adapter has a module that is no target.
        """
        unknown = sorted(set(adapter.modules) - set(self._targets))
        if unknown:
            raise InternalError(
                f"adapter generation {adapter_id} has modules {unknown}, which are no targets"
            )
        with self._lock:
            if adapter_id < 1 or adapter_id in self._host:
                raise InternalError(
                    f"adapter generation {adapter_id} is added, expected a new number, 1 or above"
                )
            self._host[adapter_id] = adapter

    def install(self, adapter_id: int, slot: int) -> None:
        """Bring an adapter to the device and write it into every table, as a whole.

        Parameters
        ----------
        adapter_id
            An adapter that was added. If it is in another slot, that slot is emptied.
        slot
            Adapter slot, >= 0. An adapter that is in it goes back to host memory only; nothing of it stays.

        Raises
        ------
        AdapterNotFoundError
            The adapter was not added, or was removed.
        InternalError
            ``slot`` is negative.

        Notes
        -----
        All tensors are made before the first table changes: an error leaves every table as it was.
        """
        adapter = self._get(adapter_id)
        if slot < 0:
            raise InternalError(
                f"adapter generation {adapter_id} is installed in slot {slot}, expected 0 or above"
            )
        entries = [self._layer_weights(layout, adapter) for layout in self._layouts]
        for other_id, other_slot in list(self._slot_of.items()):
            if other_slot == slot or other_id == adapter_id:
                self._clear_slot(other_id)
        for layout, weights in zip(self._layouts, entries, strict=True):
            layout.table.install(slot, weights)
        with self._lock:
            self._slot_of[adapter_id] = slot

    def install_nothing(self, slot: int) -> None:
        """Let a slot whose adapter could not be installed have no module anywhere.

        Then a step with rows that name it runs; whoever calls this must not use what they give.
        """
        for layout in self._layouts:
            layout.table.install(slot, (None,) * len(layout.modules))

    def evict(self, adapter_id: int) -> None:
        """Take an adapter off the device; its host copy stays, so that it can be installed again.

        Raises
        ------
        AdapterNotFoundError
            The adapter was not added, or was removed.
        InternalError
            It is not on the device.
        """
        self._get(adapter_id)
        if adapter_id not in self._slot_of:
            raise InternalError(f"adapter generation {adapter_id} is evicted but is in no slot")
        self._clear_slot(adapter_id)

    def remove(self, adapter_id: int) -> None:
        """Empty the adapter's slot, if it has one, and drop its host copy.

        Raises
        ------
        AdapterNotFoundError
            The adapter was not added, or was removed; nothing changes.
        """
        self._get(adapter_id)
        self._clear_slot(adapter_id)
        with self._lock:
            del self._host[adapter_id]

    def __contains__(self, adapter_id: int) -> bool:
        """Whether the adapter was added and not removed."""
        with self._lock:
            return adapter_id in self._host

    def snapshot(self) -> list[AdapterResidency]:
        """Where every adapter is, in the order of their numbers."""
        with self._lock:
            held = [(i, self._slot_of.get(i, NO_SLOT), adapter) for i, adapter in self._host.items()]
        return [
            AdapterResidency(
                adapter_id=adapter_id,
                adapter_slot=slot,
                num_bytes=adapter.num_bytes,
                lora_rank=adapter.lora_rank,
                target_modules=adapter.target_modules,
            )
            for adapter_id, slot, adapter in sorted(held, key=lambda entry: entry[0])
        ]

    def _get(self, adapter_id: int) -> HostAdapter:
        with self._lock:
            adapter = self._host.get(adapter_id)
        if adapter is None:
            raise AdapterNotFoundError(f"adapter generation {adapter_id} is not in host memory; add it first")
        return adapter

    def _clear_slot(self, adapter_id: int) -> None:
        with self._lock:
            slot = self._slot_of.pop(adapter_id, None)
        if slot is not None:
            for layout in self._layouts:
                layout.table.clear(slot)

    def _layer_weights(self, layout: _TableLayout, adapter: HostAdapter) -> LoRALayerWeights:
        weights: list[LoRASliceWeights | None] = []
        for module in layout.modules:
            host = adapter.modules.get(module) if module is not None else None
            if host is None:
                weights.append(None)
                continue
            weights.append(LoRASliceWeights(host.a.to(self._device), host.b.to(self._device), host.scaling))
        layout.table.check(tuple(weights))
        return tuple(weights)


def _table_layouts(targets: Mapping[str, LoRATarget]) -> list[_TableLayout]:
    """Group the targets by table, each table once, in the order in which the targets name them."""
    modules_of: dict[int, list[str | None]] = {}
    tables: dict[int, LoRALayerTable] = {}
    for module, target in targets.items():
        tables[id(target.table)] = target.table
        slices = modules_of.setdefault(id(target.table), [None] * target.table.num_slices)
        taken = slices[target.slice_index]
        if taken is not None:
            raise InternalError(f"LoRA targets '{taken}' and '{module}' name one slice of one table")
        slices[target.slice_index] = module
    return [_TableLayout(tables[key], tuple(modules)) for key, modules in modules_of.items()]
