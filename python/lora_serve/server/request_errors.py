"""Errors of a single HTTP request, which know the field that caused them."""

from __future__ import annotations

from lora_serve.common.errors import (
    AdapterNotFoundError,
    CapacityError,
    InvalidArgumentError,
    LoraServeError,
)


class RequestError(InvalidArgumentError):
    """The request is wrong; trying again unchanged cannot help (HTTP 400).

    Parameters
    ----------
    message : str
        What was found, what was expected and what to do.
    param : str or None
        The request's field, such as 'max_tokens' or 'messages.0.content'.
    code : str or None
        A short word for programs, such as 'unknown_field'.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelNotFoundError(AdapterNotFoundError):
    """The request names a model or an adapter that does not serve (HTTP 404).

    Parameters
    ----------
    message : str
        Which name, and where to find the names that serve.
    param : str
        The field that held the name: 'model' or 'lora_path'.
    """

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


class ServerShutdownError(LoraServeError):
    """The server ends before the request has (HTTP 503)."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; send the request again, to another server or later")


class BodyTimeoutError(LoraServeError):
    """The client has not sent its request's body in time (HTTP 408).

    Parameters
    ----------
    timeout_s : float
        How long it had.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"the request's body was not complete after {timeout_s:g} s; send it faster, or let the "
            "operator start the server with a higher --body-timeout"
        )


class BodyTooLargeError(LoraServeError):
    """The request's body is longer than the server accepts (HTTP 413)."""


class TooManyRequestsError(CapacityError):
    """The key, or the server, has as many requests at once as it may (HTTP 429); a tenant may read why."""


class GenerationAbortedError(LoraServeError):
    """The answer was ended by somebody else, such as a forced unload of its adapter (HTTP 424)."""

    def __init__(self) -> None:
        super().__init__("the answer was ended before it was complete; its adapter may have been unloaded")
