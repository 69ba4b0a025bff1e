"""The exceptions that users of lora_serve may catch; the C++ core raises the same classes."""

from __future__ import annotations


class LoraServeError(Exception):
    """Base of every error that lora_serve raises on purpose."""


class InvalidArgumentError(LoraServeError, ValueError):
    """A configuration, a request or an adapter file is wrong and has to be changed (HTTP 400)."""


class AdapterSourceError(InvalidArgumentError):
    """An adapter's path leads to no adapter that may be loaded; the adapter itself was not looked at."""


class NotFoundError(LoraServeError, LookupError):
    """Something that was named does not exist (HTTP 404)."""


class AdapterNotFoundError(NotFoundError):
    """No adapter of this name or generation serves new requests (HTTP 404)."""


class RequestNotFoundError(NotFoundError):
    """No live request has this id (HTTP 404)."""


class AdapterConflictError(LoraServeError):
    """The adapter's name is in use in a way that this call must not change (HTTP 409)."""


class CapacityError(LoraServeError):
    """The request can never fit, or too much is queued already (HTTP 429).

    Parameters
    ----------
    message : str
        What is full, its limit, and what to do.
    retry_after_s : int or None
        Seconds after which another try is worth it; None where waiting does not help, or nobody knows.
    """

    def __init__(self, message: str = "", retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueTimeoutError(CapacityError):
    """The request waited for as long as it was allowed to, and did not begin to run (HTTP 503)."""


class InternalError(LoraServeError):
    """A bug, or the engine has stopped; details are in the log (HTTP 500)."""
