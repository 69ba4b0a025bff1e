"""The token that each page-table row sampled last, for plans that were made before anybody knew it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.common.errors import InternalError

if TYPE_CHECKING:
    from lora_serve.scheduler import ExecutionPlan

UNKNOWN = -1
"""In `token_ids` of a plan: the token that the row sampled last."""
NO_TOKEN = -1
"""The last token of a row that has sampled nothing."""
FAILED = -2
"""The last token, or the sampled one, of a row that has failed."""


class LastSampledTokens:
    """The token that each page-table row sampled last.

    A plan that is made while the one before still runs cannot name the input token of a row that samples in
    it; it says -1, and the token is filled in here, when the earlier plan has run. A request keeps its
    page-table row as long as a plan with it is on its way, so the row says whose token it is.

    Parameters
    ----------
    max_num_seqs : int
        Page-table rows.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._tokens = np.full(max_num_seqs, NO_TOKEN, dtype=np.int64)

    def fill(self, token_ids: Tensor | npt.NDArray[np.int64], plan: ExecutionPlan) -> list[int]:
        """Replace every -1 of a plan's input tokens.

        Parameters
        ----------
        token_ids : Tensor or numpy.ndarray
            [T], the plan's `token_ids` in memory of the caller's, changed in place.
        plan : ExecutionPlan
            The step that is about to run; its `token_ids` tell where the tokens are unknown.

        Returns
        -------
        list of int
            Rows that have no input token, because they failed in the plan before: they compute with token 0,
            and must not sample.

        Raises
        ------
        InternalError
            A row that has sampled nothing refers to its last token.

        Notes
        -----
        O(T) to look, O(rows) to fill.
        """
        unknown = np.flatnonzero(plan.token_ids == UNKNOWN)
        if not len(unknown):
            return []
        row_ends = np.cumsum(plan.num_scheduled_tokens)
        rows = np.searchsorted(row_ends, unknown, side="right")
        tokens = self._tokens[plan.page_table_rows[rows]]
        if (tokens == NO_TOKEN).any():
            row = int(rows[tokens == NO_TOKEN][0])
            raise InternalError(
                f"plan {plan.plan_id}, row {row}: the input token is the last one sampled by page-table row "
                f"{plan.page_table_rows[row]}, which has sampled none"
            )
        failed: list[int] = rows[tokens == FAILED].tolist()
        values = np.where(tokens == FAILED, 0, tokens)
        if isinstance(token_ids, Tensor):
            index = torch.from_numpy(unknown).to(token_ids.device)
            token_ids[index] = torch.from_numpy(values).to(token_ids)
        else:
            token_ids[unknown] = values
        return failed

    def note(self, plan: ExecutionPlan, token_ids: npt.NDArray[np.int32]) -> None:
        """Take what a plan has sampled.

        Parameters
        ----------
        plan : ExecutionPlan
            The step that has run.
        token_ids : numpy.ndarray
            [B] int32; -1 where the row did not sample, or could not.
        """
        samples = plan.samples_token.astype(bool)
        self._tokens[plan.page_table_rows] = np.where(samples & (token_ids < 0), FAILED, token_ids)
