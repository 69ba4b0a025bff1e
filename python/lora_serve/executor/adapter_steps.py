"""What plans order for adapters, done before the rows of each plan run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_serve.lora.manager import LoadReports, LoRAManager

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan


class AdapterSteps:
    """Carries out drains, evictions and loads, and remembers which loads have failed.

    Parameters
    ----------
    lora : LoRAManager
        The adapter memory.
    """

    def __init__(self, lora: LoRAManager) -> None:
        self._lora = lora
        self._failed_slots: dict[int, int] = {}  # To the generation whose load has failed.

    def begin(self, plan: ExecutionPlan) -> LoadReports:
        """Take drained and evicted adapters off the device, do the plan's loads; tell how these have ended.

        Notes
        -----
        Rows of this plan and of the next may name the slot of a load that has failed: they run without the
        adapter, and fail.
        """
        for adapter_id in plan.drained_adapter_ids.tolist():
            self._lora.free(adapter_id)
        for adapter_id in plan.evicted_adapter_ids.tolist():
            if adapter_id not in self._failed_slots.values():  # Or the plan was made before that was known.
                self._lora.evict(adapter_id)
        slot_of = dict(zip(plan.load_adapter_ids.tolist(), plan.load_adapter_slots.tolist(), strict=True))
        for slot in slot_of.values():
            self._failed_slots.pop(slot, None)
        loads = self._lora.take_loads(slot_of)
        for adapter_id in loads.failed:
            self._failed_slots[slot_of[adapter_id]] = adapter_id
        return loads

    def row_errors(self, plan: ExecutionPlan) -> dict[int, str]:
        """Rows whose adapter is not on the device because its load has failed, with the reason."""
        if not self._failed_slots:
            return {}
        return {
            row: "its adapter could not be brought to the device"
            for row, slot in enumerate(plan.adapter_slots.tolist())
            if slot in self._failed_slots
        }
