"""What a server and its engine hold: memory over time, and what is left when all is over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .memory import read_status

_MIB = 2**20

BOUNDS: dict[str, tuple[float, float]] = {
    "server_rss": (8 * _MIB, 24 * _MIB),
    "engine_rss": (16 * _MIB, 96 * _MIB),
    "server_threads": (6.0, 12.0),
    "engine_threads": (6.0, 12.0),
}
"""For each series: by how much the line of least squares may rise from the end of the warm-up to the last
sample, and how far the largest may be above the least in that time. Bytes; and threads, of which pools begin
more when more happens at once than ever before.

In two minutes at 50 answers a second, 8 MiB are a leak of 1.4 KiB an answer."""
_MUST_BE_ZERO = (
    *("num_waiting_requests", "num_running_requests", "num_preempted_requests"),
    *("num_queued_requests", "num_queued_tokens", "num_private_pages", "num_transfers"),
    *("num_adapters_in_line", "num_paused_adapters", "num_adapters_being_read"),
)
_BAD_LEVELS = (" ERROR ", " CRITICAL ")
_BAD_BEGINNINGS = ("Traceback", "Fatal Python error")
_MUST_BE_ZERO_WITHOUT_ADAPTERS = ("num_adapters", "num_resident_adapters", "num_adapter_bytes")


class ServerProcesses:
    """The two processes of a server, as the system sees them.

    Parameters
    ----------
    pid
        The server's; its only child is the engine.
    """

    def __init__(self, pid: int) -> None:
        self._server = pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        self._engine = int(child)

    def sample(self) -> dict[str, float]:
        """Sizes now."""
        found: dict[str, float] = {}
        for name, pid in (("server", self._server), ("engine", self._engine)):
            status = read_status(pid)
            found[f"{name}_rss"] = status["VmRSS"]
            found[f"{name}_threads"] = len(os.listdir(f"/proc/{pid}/task"))
        return found

    def num_sockets(self) -> int:
        """Sockets that the server has open, listening and internal ones included."""
        folder = f"/proc/{self._server}/fd"
        num_sockets = 0
        for name in os.listdir(folder):
            try:
                num_sockets += os.readlink(f"{folder}/{name}").startswith("socket:")
            except FileNotFoundError:
                continue  # Closed meanwhile.
        return num_sockets


def find_leftovers(loras: dict[str, Any], *, has_adapters: bool) -> list[str]:
    """What an idle engine should not hold, by what /v1/loras says; a line each."""
    stats = loras["stats"]
    names = _MUST_BE_ZERO + (() if has_adapters else _MUST_BE_ZERO_WITHOUT_ADAPTERS)
    problems = [f"{name} is {stats[name]} and nothing runs" for name in names if stats[name]]
    if stats["num_available_pages"] != stats["num_device_pages"]:
        problems.append(
            f"{stats['num_device_pages'] - stats['num_available_pages']} KV pages are pinned and nothing runs"
        )
    num_pages = stats["num_free_pages"] + stats["num_tree_pages"]
    if num_pages != stats["num_device_pages"]:
        problems.append(
            f"{num_pages} KV pages are free or in the tree, instead of {stats['num_device_pages']}"
        )
    if not has_adapters:
        problems += [f"adapter {one['name']!r} is still there: {one}" for one in loras["data"]]
    return problems


def num_base_pages(loras: dict[str, Any]) -> tuple[int, int]:
    """KV pages of the base model, on the device and on the host: all that adapters do not hold."""
    stats, adapters = loras["stats"], loras["data"]
    on_host = stats["num_host_pages"] - stats["num_free_host_pages"]
    return (
        stats["num_tree_pages"] - sum(one["num_tree_pages"] for one in adapters),
        on_host - sum(one["num_host_pages"] for one in adapters),
    )


def find_log_problems(log: str) -> list[str]:
    """Lines of the server's log that say that something went wrong."""
    return [
        line
        for line in log.splitlines()
        if any(level in line for level in _BAD_LEVELS) or line.startswith(_BAD_BEGINNINGS)
    ]
