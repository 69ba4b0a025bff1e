"""Stands in for FlashInfer's compiled modules: obeys the same arguments, in torch, on a CPU.

A plan is copied to the workspace as FlashInfer does; a run reads what FlashInfer's kernels read on the
device, so that wrong offsets, stale memory and mixed-up rows show in the output. Not modelled: how work is
divided.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class FakeModule:
    """One kernel of one shape."""

    def __init__(self, name: str, has_window: bool) -> None:
        self.name = name
        self.has_window = has_window
        self.plan_arguments: list[list] = []
        self.plan_info = (7, 3)

    def plan(self, *arguments) -> tuple[int, ...]:
        assert len(arguments) == (20 if self.name == "fa2" else 16)
        float_workspace, workspace, pinned, qo_indptr, page_indptr, kv_lens = arguments[:6]
        num_tokens, num_rows = arguments[6:8]
        window_left = arguments[15]
        assert self.has_window == (window_left >= 0)
        assert len(pinned) == len(workspace)
        assert len(float_workspace) > 0
        assert (len(qo_indptr), len(page_indptr), len(kv_lens)) == (num_rows + 1, num_rows + 1, num_rows)
        assert (int(qo_indptr[0]), int(qo_indptr[-1])) == (0, num_tokens)
        self.plan_arguments.append(list(arguments))
        plan = torch.cat((torch.tensor([num_rows], dtype=torch.int32), qo_indptr, page_indptr, kv_lens))
        pinned[: 4 * len(plan)].view(torch.int32).copy_(plan)
        workspace[: 4 * len(plan)].copy_(pinned[: 4 * len(plan)])
        return self.plan_info

    def paged_run(self, *arguments) -> None:
        (
            _,
            workspace,
            plan_info,
            query,
            keys,
            values,
            qo_indptr,
            page_indptr,
            page_indices,
            last_page_len,
        ) = arguments[:10]
        output, lse, mask, layout, window_left = arguments[10:15]
        scaling = arguments[23]
        assert len(arguments) == 31
        assert (lse, layout, plan_info) == (None, 0, self.plan_info)
        page_size = keys.shape[1]
        if self.name == "fa3":
            plan = workspace.view(torch.int32)
            num_rows = int(plan[0])
            qo_indptr = plan[1 : num_rows + 2]
            page_indptr = plan[num_rows + 2 : 2 * num_rows + 3]
            kv_lens = plan[2 * num_rows + 3 : 3 * num_rows + 3]
        else:
            assert len(last_page_len) == len(qo_indptr) - 1
            kv_lens = (page_indptr.diff() - 1) * page_size + last_page_len
        for row in range(len(qo_indptr) - 1):
            tokens = slice(int(qo_indptr[row]), int(qo_indptr[row + 1]))
            pages = page_indices[int(page_indptr[row]) : int(page_indptr[row + 1])].long()
            row_keys, row_values = (x[pages].flatten(0, 1)[: int(kv_lens[row])] for x in (keys, values))
            output[tokens] = _attend(query[tokens], row_keys, row_values, scaling, bool(mask), window_left)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, is_causal: bool, window_left: int
) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scaling
    behind = (len(keys) - len(query) + torch.arange(len(query)))[:, None] - torch.arange(len(keys))[None]
    if not is_causal:
        behind = (len(keys) - 1 - torch.arange(len(keys)))[None].expand(len(query), -1)
    hidden = behind < 0
    if window_left >= 0:
        hidden = hidden | (behind > window_left)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)


class FakeFlashInfer:
    """Stands for `flashinfer.prefill`."""

    def __init__(self) -> None:
        self.modules: list[FakeModule] = []

    def get_batch_prefill_module(self, name: str, *arguments) -> FakeModule:
        dtype_q, dtype_kv, dtype_o, dtype_index, dim_qk, dim_vo, positions, has_window, cap, fp16 = arguments
        assert dtype_q == dtype_kv == dtype_o
        assert (dtype_index, dim_qk, positions, cap, fp16) == (torch.int32, dim_vo, 0, False, False)
        module = FakeModule(name, has_window)
        self.modules.append(module)
        return module
