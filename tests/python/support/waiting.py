"""Waiting for something that others of the same event loop do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

LONGEST_WAIT_S = 60.0


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until a condition holds; the test fails where that takes too long."""
    deadline = time.monotonic() + LONGEST_WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it did not happen")
        await asyncio.sleep(0.001)
