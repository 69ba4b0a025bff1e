from __future__ import annotations

import io
import logging
import threading

import pytest

from lora_serve.engine.loop_log import LoopLogHandler


class SlowStream(io.StringIO):
    """Takes nothing before the test says so."""

    def __init__(self):
        super().__init__()
        self.may_write = threading.Event()

    def write(self, text):
        assert self.may_write.wait(60)
        return super().write(text)


@pytest.fixture
def logger():
    logger = logging.Logger("engine")
    yield logger
    for handler in logger.handlers:
        handler.close()


def test_log_call_returns_while_the_stream_takes_nothing_and_close_waits_for_all_lines(logger):
    stream = SlowStream()
    handler = LoopLogHandler(stream, "%(levelname)s %(name)s: %(message)s")
    logger.addHandler(handler)
    for number in range(3):
        logger.info("line %d", number)
    assert stream.getvalue() == ""
    stream.may_write.set()
    handler.close()
    assert stream.getvalue() == "".join(f"INFO engine: line {number}\n" for number in range(3))
    handler.close()


def test_exception_is_written_once_with_its_origin(logger):
    stream = io.StringIO()
    handler = LoopLogHandler(stream, "%(message)s")
    logger.addHandler(handler)
    try:
        raise ValueError("bad")
    except ValueError:
        logger.exception("a step failed")
    handler.close()
    assert stream.getvalue().startswith("a step failed\nTraceback")
    assert stream.getvalue().count("ValueError: bad") == 1


def test_line_has_its_prefix_once_also_when_logging_is_set_up_with_the_handler():
    stream = io.StringIO()
    handler = LoopLogHandler(stream, "%(levelname)s %(message)s")
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        root.handlers = []
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        logging.getLogger("somewhere").info("loaded %d", 3)
    finally:
        root.handlers[:], root.level = before
    handler.close()
    assert stream.getvalue() == "INFO loaded 3\n"
