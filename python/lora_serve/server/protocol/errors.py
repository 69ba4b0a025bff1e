"""Bodies of errors, as the OpenAPI schema shows them; `error_handlers` makes them."""

from __future__ import annotations

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What is wrong with a request.

    Parameters
    ----------
    message : str
        What was found, what was expected and what to do.
    type : str
        The error's class, such as 'invalid_request_error'.
    param : str or None
        The request's field.
    code : str or None
        A short word for programs.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """An error in OpenAI's shape; other servers' endpoints have their own fields beside it."""

    error: ErrorDetail
