"""What the executors of all devices have in common: what they tell of their memory, and the report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from lora_serve.executor.executor import NO_PLAN, ExecutionResult
from lora_serve.executor.transfers import PageTransfers, TransferReports
from lora_serve.lora.manager import LoRAManager
from lora_serve.models.config import ModelConfig


@dataclass(frozen=True)
class MemorySizes:
    """What the memory of both tiers holds.

    Parameters
    ----------
    num_device_pages, num_host_pages : int
        KV pages; no host pages = there is no host tier.
    max_model_len : int
        Longest prompt plus answer in tokens.
    """

    num_device_pages: int
    num_host_pages: int
    max_model_len: int


class ExecutorBase(ABC):
    """The part of `Executor` that does not depend on how plans are run.

    Parameters
    ----------
    model_config : ModelConfig
        The model's.
    lora : LoRAManager
        The adapter memory.
    transfers : PageTransfers
        Copies between the tiers.
    sizes : MemorySizes
        Of both tiers.
    """

    def __init__(
        self, model_config: ModelConfig, lora: LoRAManager, transfers: PageTransfers, sizes: MemorySizes
    ) -> None:
        self.model_config = model_config
        self.lora = lora
        self._transfers = transfers
        self._sizes = sizes

    @property
    def num_device_pages(self) -> int:
        """KV pages."""
        return self._sizes.num_device_pages

    @property
    def num_host_pages(self) -> int:
        """KV pages of the host tier; 0 = there is none."""
        return self._sizes.num_host_pages

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer in tokens."""
        return self._sizes.max_model_len

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.model_config.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The model's end-of-sequence tokens."""
        return self.model_config.eos_token_ids

    def report(self) -> ExecutionResult:
        """Give the copies that have ended since the last result; see `Executor.report`."""
        is_idle = self._num_in_flight() == 0
        transfers = self._transfers.take_reports() if is_idle else TransferReports()
        return ExecutionResult(
            NO_PLAN,
            np.empty(0, dtype=np.int32),
            [],
            [],
            {},
            completed_transfer_ids=transfers.completed,
            failed_transfer_ids=transfers.failed,
        )

    @abstractmethod
    def _num_in_flight(self) -> int:
        """Plans that were submitted and not collected."""
