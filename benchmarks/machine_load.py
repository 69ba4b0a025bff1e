"""How much of the machine other processes use while something is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path


def busy_s() -> tuple[float, float]:
    """Seconds of core time that everything on the machine has used since it started, and this process."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = (int(field) for field in fields[:8])
    ticks = user + nice + system + interrupts + soft_interrupts + stolen
    return ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


class CoreUse:
    """What others use from its construction on."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._begin_all_s, self._begin_own_s = busy_s()

    def others_s(self, children_s: float = 0.0) -> float:
        """Seconds of core time of all other processes, less `children_s` of those that are ours, too."""
        all_s, own_s = busy_s()
        return max(0.0, all_s - self._begin_all_s - (own_s - self._begin_own_s) - children_s)

    def by_others(self, children_s: float = 0.0) -> float:
        """Cores that all other processes kept busy, on average; `children_s` as of `others_s`."""
        return round(self.others_s(children_s) / (time.perf_counter() - self._begin), 2)
