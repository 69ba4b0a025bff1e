"""How long each stage of a start takes, for the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def log_stage(logger: logging.Logger, name: str) -> Iterator[None]:
    """Log how long the body took, as ``<name> ready in <seconds> s``; nothing where it raises.

    Parameters
    ----------
    logger
        Of the module that runs the stage.
    name
        What the body makes, such as 'model'.
    """
    begin = time.perf_counter()
    yield
    logger.info("%s ready in %.1f s", name, time.perf_counter() - begin)
