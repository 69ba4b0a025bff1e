"""How a request waits for its first step."""

from __future__ import annotations

from dataclasses import dataclass

from lora_serve.common.field_checks import check_float, check_int

MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1
MAX_QUEUE_TIMEOUT_S = 1e9
"""More than 30 years: whoever means 'for ever' says nothing instead."""


@dataclass(frozen=True)
class Queueing:
    """How a request waits for its first step.

    Parameters
    ----------
    priority : int
        Class of priority, of 32 bits; lower goes first. A request that waits rises with time.
    timeout_s : float or None
        Seconds, above 0: a request that has not begun to run by then fails with QueueTimeoutError. None = it
        waits as long as it must.

    Raises
    ------
    InvalidArgumentError
        A value is out of range; the message names `priority` or `queue_timeout`.
    """

    priority: int = 0
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        check_int("priority", self.priority, MIN_PRIORITY, MAX_PRIORITY)
        if self.timeout_s is not None:
            check_float("queue_timeout", self.timeout_s, 0.0, MAX_QUEUE_TIMEOUT_S, above_minimum=True)


DEFAULT_QUEUEING = Queueing()
