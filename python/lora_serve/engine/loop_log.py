"""A log that the step loop never waits for."""

from __future__ import annotations

import logging
import logging.handlers
from queue import SimpleQueue
from typing import Any, TextIO


class LoopLogHandler(logging.handlers.QueueHandler):
    """Leaves lines to a thread of its own, which writes them to a stream in their order.

    A write lets go of the interpreter lock, and a thread that loads an adapter takes it: the loop would then
    wait for it with every line, and where nobody empties the pipe behind the stream, for ever.

    Owns: the thread. `close`, which `logging.shutdown` calls too, returns when all lines are written.

    Parameters
    ----------
    stream
        Where the lines go.
    line_format
        As ``logging.Formatter`` takes it, or a formatter.
    """

    def __init__(self, stream: TextIO, line_format: str | logging.Formatter) -> None:
        lines: SimpleQueue[Any] = SimpleQueue()
        super().__init__(lines)
        self.setFormatter(logging.Formatter("%(message)s"))  # The writer's adds the rest, once.
        writer = logging.StreamHandler(stream)
        if isinstance(line_format, str):
            line_format = logging.Formatter(line_format)
        writer.setFormatter(line_format)
        self._writer: logging.handlers.QueueListener | None = logging.handlers.QueueListener(lines, writer)
        self._writer.start()

    def close(self) -> None:
        """Write what is left, and end the thread. Closing twice changes nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.stop()
        super().close()
