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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.kernels.lora_tiles import TILE_FIELDS, TILE_KINDS, build_lora_tiles, num_tile_entries


@dataclass(frozen=True, eq=False)
class LoRAGroups:
    """The tokens of a step that have an adapter, in groups of one adapter: what the torch operators read.

    N tokens in G groups of at most M; sorted order means by ascending slot, then by position in the step.
    Padded order is [G, M], where a group with fewer tokens repeats its first. M is the mean number of tokens
    of an adapter, and who has more has several groups: so there are less than twice as many groups as
    adapters and about 2 N padded tokens at most, however unequal the adapters' shares are.

    Parameters
    ----------
    slots, counts
        [G] int64 on the host: adapter slot, ascending, and number of tokens, 1 to M.
    max_count
        M; 0 where no token has an adapter.
    tokens
        [N] int64: position in the step of each token, in sorted order.
    group_of_token
        [N] int64 on the host: index in ``slots`` of each, in sorted order.
    padded_tokens
        [G * M] int64: position in the step of each token, in padded order.
    places
        [N] int64: where each token of the sorted order is in the padded one; None where both are the same.
    """

    slots: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    max_count: int
    tokens: Tensor
    group_of_token: npt.NDArray[np.int64]
    padded_tokens: Tensor
    places: Tensor | None


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
    lora_tiles
        [6, 1 + N, 3] int32, each list contiguous, N >= T // 16 + G for G groups: the groups, cut into tiles
        of rows for the device kernels; see `build_lora_tiles`. What lies behind the last tile means nothing.
    no_adapter
        Host flag: no token of this step has an adapter (also True for an empty step).

    Notes
    -----
    The tensors may be views of one larger tensor, such as a plan's block on the device.
    Immutable: the tensors must not be written after construction, nor the table rows of the step's slots
    while it runs, because what the torch operators derive from them is kept here for all layers.
    """

    token_lora_mapping: Tensor
    token_indices_sorted_by_lora_ids: Tensor
    num_tokens_per_lora: Tensor
    lora_token_start_loc: Tensor
    active_lora_ids: Tensor
    lora_tiles: Tensor
    no_adapter: bool

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in the step."""
        return self.token_lora_mapping.shape[0]

    @cached_property
    def _lists(self) -> dict[tuple[int, int], Tensor]:
        """The tiles of each kind, checked: one step's list for another would leave rows out in silence."""
        tiles, order = self.lora_tiles, self.token_indices_sorted_by_lora_ids
        least = num_tile_entries(self.num_tokens, min(self.num_tokens, 1))
        is_good = tiles.dim() == 3 and tiles.shape[::2] == (len(TILE_KINDS), TILE_FIELDS)
        is_good = is_good and tiles.shape[1] >= least and tiles.stride()[1:] == (TILE_FIELDS, 1)
        if not is_good or tiles.dtype != torch.int32 or tiles.device != order.device:
            raise ValueError(
                f"lora_tiles has shape {tuple(tiles.shape)}, strides {tiles.stride()} and is {tiles.dtype} "
                f"on {tiles.device}, expected at least [{len(TILE_KINDS)}, {least}, {TILE_FIELDS}] for "
                f"{self.num_tokens} tokens, each list contiguous, int32 on {order.device}"
            )
        return dict(zip(TILE_KINDS, tiles.unbind(), strict=True))

    def tiles_of(self, few: int, many: int = 0) -> Tensor:
        """[1 + N, 3]: the tiles of one of `TILE_KINDS`; `many` is 0 where it is `few`.

        Raises
        ------
        ValueError
            There is no such kind, or these are not the tiles of so many tokens.
        """
        kind = (few, many or few)
        if kind not in TILE_KINDS:
            raise ValueError(f"no step has tiles of {kind} rows, expected one of {TILE_KINDS}")
        return self._lists[kind]

    def most_tiles(self, rows: int) -> int:
        """The largest number of tiles of so many rows, T // rows + G, known without the device."""
        num_groups = self.lora_tiles.shape[1] - num_tile_entries(self.num_tokens, 0)
        return self.num_tokens // rows + min(num_groups, self.num_tokens)

    @cached_property
    def groups(self) -> LoRAGroups:
        """The tokens with an adapter; read back to the host once a step.

        Notes
        -----
        Reads three small tensors on the host, which on an accelerator waits for the device. It serves the
        torch operators only; device kernels read `lora_tiles`.
        """
        device = self.token_lora_mapping.device
        counts, slots, order = (
            tensor.cpu().numpy().astype(np.int64)
            for tensor in (
                self.num_tokens_per_lora,
                self.active_lora_ids,
                self.token_indices_sorted_by_lora_ids,
            )
        )
        is_used = (slots >= 0) & (counts > 0)
        slots, counts = slots[is_used], counts[is_used]
        num_tokens = int(counts.sum())
        max_count = -(-num_tokens // max(len(slots), 1))
        slots, counts = _split(slots, counts, max_count)
        num_groups = len(slots)
        tokens = order[len(order) - num_tokens :]  # Those without an adapter come first.
        group_of_token = np.repeat(np.arange(num_groups), counts)
        starts = np.cumsum(counts) - counts
        places = group_of_token * max_count + np.arange(num_tokens) - starts[group_of_token]
        padded_tokens = np.repeat(tokens[starts], max_count)
        padded_tokens[places] = tokens

        def on_device(array: npt.NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(array).to(device)

        return LoRAGroups(
            slots=slots,
            counts=counts,
            max_count=max_count,
            tokens=on_device(tokens),
            group_of_token=group_of_token,
            padded_tokens=on_device(padded_tokens),
            places=None if num_tokens == num_groups * max_count else on_device(places),
        )

    @cached_property
    def of_tables(self) -> dict[Any, Any]:
        """What an implementation derives from the tables for this step's slots, by whatever key it likes."""
        return {}


def _split(
    slots: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], max_count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Slots and sizes of groups of at most `max_count` tokens: the last of a slot has the rest."""
    if not len(counts) or int(counts.max()) <= max_count:
        return slots, counts
    num_parts = -(-counts // max_count)
    sizes = np.full(int(num_parts.sum()), max_count)
    sizes[np.cumsum(num_parts) - 1] = counts - (num_parts - 1) * max_count
    return np.repeat(slots, num_parts), sizes


def build_lora_metadata(
    token_lora_mapping: Tensor, max_loras: int, *, device: torch.device | None = None
) -> LoRAMetadata:
    """Group the tokens of a step by adapter slot, as the scheduler's core does for its plans.

    The tokens may be any rows: those whose logits are computed have a grouping of their own.

    Parameters
    ----------
    token_lora_mapping
        [T] int32 or int64, any device: adapter slot of each token, -1 = no adapter. T may be 0. Copied.
    max_loras
        Largest number of distinct adapters in one step, >= 1. Sizes the arrays; slot numbers themselves
        are not bounded by it.
    device
        Where the result goes, by one copy of all its tensors. None = where ``token_lora_mapping`` is.

    Returns
    -------
    LoRAMetadata
        Its tensors are views of one.

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
    mapping = token_lora_mapping.to(torch.int32)
    num_tokens = mapping.shape[0]
    slots, counts = torch.unique(mapping, sorted=True, return_counts=True)
    num_groups = slots.shape[0]
    num_adapters = int((slots >= 0).sum())
    if num_groups > 0 and int(slots[0]) < -1:
        raise ValueError(f"token_lora_mapping holds slot {int(slots[0])}, expected -1 (no adapter) or above")
    if num_adapters > max_loras:
        raise ValueError(f"the step holds {num_adapters} distinct adapters, expected at most {max_loras}")

    tiles = build_lora_tiles(slots, counts, num_tokens, max_loras + 1)
    sizes = [num_tokens, num_tokens, max_loras + 1, max_loras + 2, max_loras + 1, tiles.numel()]
    block = torch.zeros(sum(sizes), dtype=torch.int32, device=mapping.device)
    token_slots, order, group_sizes, group_starts, group_slots, all_tiles = torch.split(block, sizes)
    token_slots.copy_(mapping)
    if num_tokens:
        order.copy_(torch.argsort(mapping, stable=True))
    group_sizes[:num_groups] = counts
    torch.cumsum(group_sizes, 0, dtype=torch.int32, out=group_starts[1:])
    group_slots.fill_(-1)[:num_groups] = slots
    all_tiles.copy_(tiles.view(-1))
    token_slots, order, group_sizes, group_starts, group_slots, all_tiles = torch.split(
        block.to(device), sizes
    )
    return LoRAMetadata(
        token_lora_mapping=token_slots,
        token_indices_sorted_by_lora_ids=order,
        num_tokens_per_lora=group_sizes,
        lora_token_start_loc=group_starts,
        active_lora_ids=group_slots,
        lora_tiles=all_tiles.view(tiles.shape),
        no_adapter=num_adapters == 0,
    )
