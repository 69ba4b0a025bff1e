"""How lines of the log look: text for people, JSON for machines."""

from __future__ import annotations

import json
import logging
import os
import time

FORMAT_VARIABLE = "LORA_SERVE_LOG_FORMAT"
"""Environment variable that tells the engine's process which one to write: 'text' or 'json'."""
LOG_FORMATS = ("text", "json")
_EXTRA_FIELDS = ("request_id", "caller", "status")
"""Attributes of a record that stand in a line of JSON of their own, where a record has them."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, process, logger, message, and what belongs to a request.

    Parameters
    ----------
    process : str
        'server' or 'engine'.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Give the line of a record; a stack trace stands in it, with its line breaks escaped."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in _EXTRA_FIELDS:
            value = getattr(record, name, None)
            if value is not None:
                line[name] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def make_formatter(log_format: str, process: str, text_format: str) -> logging.Formatter:
    """Give the formatter of a process.

    Parameters
    ----------
    log_format : {'text', 'json'}
        Which one.
    process : str
        'server' or 'engine'; lines of JSON name it.
    text_format : str
        As `logging.Formatter` takes it, for text.
    """
    return JsonFormatter(process) if log_format == "json" else logging.Formatter(text_format)


def format_of_environment() -> str:
    """Give the format that the starting process has chosen."""
    return os.environ.get(FORMAT_VARIABLE, LOG_FORMATS[0])
