"""Adapter memory as the engine uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from lora_serve.lora.adapter_reader import never

if TYPE_CHECKING:
    from lora_serve.lora.adapter_reader import HostAdapter
    from lora_serve.lora.eviction_order import AdapterLine
    from lora_serve.lora.host_adapters import HostNews
    from lora_serve.lora.manager import AdapterResidency


class AdapterStore(Protocol):
    """Adapter memory without what plans do to it, which is the executor's matter; really a `LoRAManager`.

    The thread of the step loop calls everything but `read`, while plans run that bring adapters in and take
    them off.
    """

    @property
    def memory_bytes(self) -> int:
        """Bytes that adapters may take on the device, as `charged_bytes` counts them; 0 = no limit."""
        ...

    @property
    def num_reads_under_way(self) -> int:
        """How many adapters are being read again, because `poll` was told that their turn is near."""
        ...

    @property
    def num_load_waits(self) -> int:
        """How often the caller may have had to wait for a thread that reads adapters, since the start."""
        ...

    def set_wake(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, from other threads, whenever `poll` has something to do."""
        ...

    def read(
        self, path: str, name: str | None = None, is_cancelled: Callable[[], bool] = never
    ) -> HostAdapter:
        """Find, read and validate an adapter; slow, for any thread.

        It may wait for room on the host, which `poll` makes, and ends early once `is_cancelled` says so.
        """
        ...

    def charged_bytes(self, adapter: HostAdapter) -> int:
        """What the scheduler has to count for an adapter on the device."""
        ...

    def add(self, adapter_id: int, adapter: HostAdapter) -> None:
        """Remember a generation, which `is_on_host` now; the caller still releases what `read` gave."""
        ...

    def remove(self, adapter_id: int) -> None:
        """Forget a generation that is not on the device any more, or never was."""
        ...

    def is_on_host(self, adapter_id: int) -> bool:
        """Whether a plan that is made before the next `poll` may load it: its rows may use it at once."""
        ...

    def touch(self, adapter_id: int) -> None:
        """A request has come for a generation: of those that nobody waits for, it leaves the host last."""
        ...

    def poll(self, line: AdapterLine) -> HostNews:
        """Take up what has ended, make room on the host, and read ahead for those in front of the line.

        Returns
        -------
        HostNews
            What has changed on the host.
        """
        ...

    def prepare_loads(self, adapter_ids: Iterable[int]) -> None:
        """Get these ready, because the plan that is submitted next loads them; all are on the host."""
        ...

    def snapshot(self) -> list[AdapterResidency]:
        """Give what is held, ordered by adapter id."""
        ...
