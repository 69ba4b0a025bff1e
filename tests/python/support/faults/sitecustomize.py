"""Faults in the processes of a server under test: Python imports this module when a process starts.

Only where this folder is on the path, and only while the file that LORA_SERVE_TEST_FAULT names is there: its
text says what happens to the next reads of files at an offset, which is how adapters' weights are read.
"""

from __future__ import annotations

import errno
import os
import pathlib
from typing import Any

_real_preadv = os.preadv


def _preadv(*arguments: Any) -> int:
    try:
        fault = pathlib.Path(os.environ["LORA_SERVE_TEST_FAULT"]).read_text()
    except (KeyError, OSError):
        return _real_preadv(*arguments)
    if fault == "exception":
        raise RuntimeError("planted in the loader's thread")
    raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))


os.preadv = _preadv
