"""The per-step map from tokens to adapter slots, in the form that segmented LoRA operators read.

A step carries tokens of many adapters and of the base model in any order. The operators work adapter by
adapter, so they need the tokens grouped: which adapter slots are present, how many tokens each has, and
where the rows of each lie. That grouping is computed once a step and shared by every layer: a plan of the
scheduler brings it along (``csrc/scheduler/adapter_grouping.h``), for everything else there is
:func:`build_lora_metadata`.

Source: field names and shapes follow the metadata of Punica-style kernels (Chen et al., 2023, "Punica:
Multi-Tenant LoRA Serving") as vLLM exposes it. Different here: the unused tail of ``lora_token_start_loc``
continues at T instead of 0, so that ``start[i + 1] - start[i] == num_tokens_per_lora[i]`` holds everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoRASegment:
    """The rows of one adapter in a step.

    Parameters
    ----------
    slot
        Adapter slot, >= 0. Rows without an adapter have no segment.
    rows
        [num_rows] int64, ascending: the positions of the segment's tokens in the step.
    """

    slot: int
    rows: Tensor


@dataclass(frozen=True)
class LoRAMetadata:
    """Tokens of one step grouped by adapter slot.

    Parameters
    ----------
    token_lora_mapping
        [T] int32: adapter slot of each token, -1 = no adapter.
    token_indices_sorted_by_lora_ids
        [T] int32: token positions, stably sorted by adapter slot (tokens without an adapter first).
    num_tokens_per_lora
        [max_loras + 1] int32: tokens of the i-th group, 0 beyond the groups in use.
    lora_token_start_loc
        [max_loras + 2] int32: where the i-th group starts in the sorted order; T beyond the groups in use.
    active_lora_ids
        [max_loras + 1] int32: adapter slot of the i-th group. -1 for the group of tokens without an adapter
        (always the first one, where it exists) and for unused entries.
    no_adapter
        Host flag: no token of this step has an adapter (also True for an empty step).

    Notes
    -----
    The tensors may be views of one larger tensor, such as a plan's block on the device.
    Immutable: the tensors must not be written after construction, because ``segments`` is cached.
    """

    token_lora_mapping: Tensor
    token_indices_sorted_by_lora_ids: Tensor
    num_tokens_per_lora: Tensor
    lora_token_start_loc: Tensor
    active_lora_ids: Tensor
    no_adapter: bool

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in the step."""
        return self.token_lora_mapping.shape[0]

    @cached_property
    def segments(self) -> tuple[LoRASegment, ...]:
        """The rows of each adapter present, in ascending slot order; read back to the host once a step.

        Notes
        -----
        Reads three small tensors on the host, which on an accelerator waits for the device. It serves the
        torch operators only; device kernels read the tensors themselves.
        """
        if self.no_adapter:
            return ()
        order = self.token_indices_sorted_by_lora_ids.to(torch.int64)
        starts = self.lora_token_start_loc.tolist()
        counts = self.num_tokens_per_lora.tolist()
        slots = self.active_lora_ids.tolist()
        return tuple(
            LoRASegment(slot=slot, rows=order[start : start + count])
            for slot, start, count in zip(slots, starts, counts, strict=False)
            if slot >= 0 and count > 0
        )


def build_lora_metadata(token_lora_mapping: Tensor, max_loras: int) -> LoRAMetadata:
    """Group the tokens of a step by adapter slot, as the scheduler's core does for its plans.

    Parameters
    ----------
    token_lora_mapping
        [T] int32 or int64, any device: adapter slot of each token, -1 = no adapter. T may be 0. Copied.
    max_loras
        Largest number of distinct adapters in one step, >= 1. Sizes the arrays; slot numbers themselves
        are not bounded by it.

    Returns
    -------
    LoRAMetadata
        On the device of ``token_lora_mapping``.

    Raises
    ------
    ValueError
        ``token_lora_mapping`` is not one-dimensional int32/int64, holds a slot below -1, or holds more than
        ``max_loras`` distinct adapter slots; or ``max_loras`` < 1.
    """
    if max_loras < 1:
        raise ValueError(f"max_loras is {max_loras}, expected at least 1")
    if token_lora_mapping.dim() != 1 or token_lora_mapping.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"token_lora_mapping has shape {tuple(token_lora_mapping.shape)} and dtype "
            f"{token_lora_mapping.dtype}, expected [T] int32 or int64"
        )
    mapping = token_lora_mapping.to(torch.int32, copy=True)
    num_tokens = mapping.shape[0]
    slots, counts = torch.unique(mapping, sorted=True, return_counts=True)
    num_groups = slots.shape[0]
    num_adapters = int((slots >= 0).sum())
    if num_groups > 0 and int(slots[0]) < -1:
        raise ValueError(f"token_lora_mapping holds slot {int(slots[0])}, expected -1 (no adapter) or above")
    if num_adapters > max_loras:
        raise ValueError(f"the step holds {num_adapters} distinct adapters, expected at most {max_loras}")

    device = mapping.device
    num_tokens_per_lora = torch.zeros(max_loras + 1, dtype=torch.int32, device=device)
    num_tokens_per_lora[:num_groups] = counts.to(torch.int32)
    lora_token_start_loc = torch.zeros(max_loras + 2, dtype=torch.int32, device=device)
    lora_token_start_loc[1:] = torch.cumsum(num_tokens_per_lora, 0)
    active_lora_ids = torch.full((max_loras + 1,), -1, dtype=torch.int32, device=device)
    active_lora_ids[:num_groups] = slots
    order = torch.argsort(mapping, stable=True) if num_tokens else mapping
    return LoRAMetadata(
        token_lora_mapping=mapping,
        token_indices_sorted_by_lora_ids=order.to(torch.int32),
        num_tokens_per_lora=num_tokens_per_lora,
        lora_token_start_loc=lora_token_start_loc,
        active_lora_ids=active_lora_ids,
        no_adapter=num_adapters == 0,
    )
