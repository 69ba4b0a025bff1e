"""The log of the server's process."""

from __future__ import annotations

import logging
import os

from lora_serve.common.log_format import FORMAT_VARIABLE, make_formatter
from lora_serve.server.current_request import current_request_id
from lora_serve.server.request_ids import access_logger

_TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s%(request_suffix)s"


class RequestIdFilter(logging.Filter):
    """Gives each record the id of the request that is served where it was made."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Set `request_id`, and what a line of text shows of it; keep every record."""
        request_id = current_request_id()
        record.__dict__["request_id"] = request_id
        record.__dict__["request_suffix"] = "" if request_id is None else f" [request {request_id}]"
        return True


def set_up_log(level: str, log_format: str, *, logs_requests: bool) -> None:
    """Let this process, and engines that it starts, write their log to stderr.

    Parameters
    ----------
    level : str
        The least severity.
    log_format : {'text', 'json'}
        How a line looks.
    logs_requests : bool
        One line a request, with its status and time.
    """
    os.environ[FORMAT_VARIABLE] = log_format
    if log_format == "json":
        os.environ.setdefault("TQDM_DISABLE", "1")  # Bars of progress are no lines of a log.
    handler = logging.StreamHandler()
    handler.setFormatter(make_formatter(log_format, "server", _TEXT_FORMAT))
    handler.addFilter(RequestIdFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    access_logger.setLevel(logging.INFO if logs_requests else logging.WARNING)
