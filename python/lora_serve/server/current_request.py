"""The id of the HTTP request that the running task serves."""

from __future__ import annotations

import contextvars

_current: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)


def current_request_id() -> str | None:
    """Give the id of the HTTP request that the running task serves; None outside of any."""
    return _current.get()


def set_current_request_id(request_id: str) -> None:
    """Note which request the running task, and every task that it starts from now on, serves."""
    _current.set(request_id)
