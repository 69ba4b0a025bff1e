"""What ends a load that nobody needs any more."""

from __future__ import annotations


class LoadCancelledError(Exception):
    """The load was cancelled, or the engine is shutting down; nothing is wrong with the adapter.

    Internal: whoever cancelled the load catches it, no user sees it. Not a ``LoraServeError``, so that code
    that reports those to a user does not take it for one.
    """
