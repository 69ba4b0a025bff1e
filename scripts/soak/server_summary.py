"""Has a soak of a server tried all that it is there for? And has the server ended in order?"""

from __future__ import annotations

from typing import Any

from lora_serve.demo.server_process import STOP_TIMEOUT_S, ServerProcess

from .server_sizes import Sizes
from .server_state import find_log_problems

MUST_BE_ANSWERS = ("answered", "left", "aborted by an unload")
_LEAST_OPEN = 0.9
"""Of all streams, at any sample after the first."""


def find_untried(summary: dict[str, Any], sizes: Sizes) -> list[str]:
    """What a load should have brought about and has not, by its summary; a line each."""
    happened = {
        **{f"answers {kind!r}": summary["answers"].get(kind, 0) for kind in MUST_BE_ANSWERS},
        "slow readers": summary["slow"],
        **{f"changes {kind!r}": count for kind, count in summary["changes"].items()},
        **{name: summary["stats"][name] for name in sizes.must_have_happened},
    }
    untried = [
        f"{what}: 0, the load does not try what it should" for what, num in happened.items() if not num
    ]
    if summary["least_open"] < _LEAST_OPEN * sizes.num_streams:
        untried.append(f"only {summary['least_open']} of {sizes.num_streams} streams were open at one time")
    return untried


def end_server(server: ServerProcess) -> list[str]:
    """End an idle server with SIGTERM; give what is wrong with its end and in its whole log, a line each."""
    status = server.terminate()
    problems = []
    if status is None:
        problems.append(f"the server still runs {STOP_TIMEOUT_S:.0f} s after SIGTERM, with nothing to do")
    elif status != 0:
        problems.append(f"the server ended with status {status} after SIGTERM, instead of 0")
    return problems + find_log_problems(server.log_path.read_text(errors="replace"))
