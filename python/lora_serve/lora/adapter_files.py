"""Plain reads of the two files of a PEFT directory; every way in which they can be missing or broken.

Nothing is memory-mapped: a file that shrinks under a map kills the process. Pickled checkpoints are not read
at all, because unpickling runs code.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import safetensors
import safetensors.torch
from torch import Tensor

from lora_serve.lora.load_problems import LoadProblems
from lora_serve.lora.peft_config import CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"

MAX_CONFIG_BYTES = 16 << 20
MAX_HEADER_BYTES = 64 << 20
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header of a safetensors file describes it.

    Parameters
    ----------
    dtype
        The format's own spelling: ``F32``, ``F16``, ``BF16``, ...
    shape
        As stored.
    """

    dtype: str
    shape: tuple[int, ...]


class AdapterFiles:
    """The files of one adapter directory.

    Parameters
    ----------
    directory
        Real path of the directory.
    problems
        Where errors are noted.
    resolve
        Gives the real path of a file inside the directory, or raises where it leads outside what is allowed
        (a file may be a link).

    Raises
    ------
    InvalidArgumentError
        The directory or one of its two files is missing, is not a regular file, or may not be read.
    """

    def __init__(self, directory: str, problems: LoadProblems, resolve: Callable[[str], str]) -> None:
        self._problems = problems
        if not os.path.isdir(directory):
            found = "is a file" if os.path.exists(directory) else "does not exist"
            problems.fail(f"{directory} {found}, expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
        missing = [
            name for name in (CONFIG_FILE, WEIGHTS_FILE) if not os.path.exists(os.path.join(directory, name))
        ]
        if WEIGHTS_FILE in missing and os.path.exists(os.path.join(directory, PICKLED_WEIGHTS_FILE)):
            problems.fail(
                f"{directory} holds {PICKLED_WEIGHTS_FILE}, expected {WEIGHTS_FILE}: pickled checkpoints are "
                "not read; save the adapter with save_pretrained(..., safe_serialization=True)"
            )
        if missing:
            problems.fail(
                f"{directory} has no {' and no '.join(missing)}; give the folder that PEFT's "
                "save_pretrained wrote"
            )
        self._config_path = resolve(os.path.join(directory, CONFIG_FILE))
        self._weights_path = resolve(os.path.join(directory, WEIGHTS_FILE))

    def read_config(self) -> bytes:
        """The content of ``adapter_config.json``.

        Raises
        ------
        InvalidArgumentError
            Not a regular file, too large, or an error while reading.
        """
        size = self._regular_size(self._config_path, CONFIG_FILE)
        if size > MAX_CONFIG_BYTES:
            self._problems.fail(f"{CONFIG_FILE} has {size} bytes, expected at most {MAX_CONFIG_BYTES}")
        return self._read(self._config_path, CONFIG_FILE, size)

    def read_header(self) -> dict[str, TensorInfo]:
        """The tensors that the weights file promises, by key; checked against the file's size.

        Raises
        ------
        InvalidArgumentError
            Not a safetensors file, or truncated.
        """
        size = self._regular_size(self._weights_path, WEIGHTS_FILE)
        prefix = self._read(self._weights_path, WEIGHTS_FILE, _LENGTH_BYTES)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < _LENGTH_BYTES or not 2 <= header_bytes <= MAX_HEADER_BYTES:
            self._broken(f"no safetensors header in its {size} bytes")
        data_start = _LENGTH_BYTES + header_bytes
        if size < data_start:
            self._broken(f"truncated: it has {size} bytes, its header alone takes {data_start}")
        content = self._read(self._weights_path, WEIGHTS_FILE, data_start)
        try:
            header = json.loads(content[_LENGTH_BYTES:].decode("utf-8"))
            header.pop("__metadata__", None)
            tensors = {
                key: TensorInfo(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
                for key, entry in header.items()
            }
            data_end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            self._broken(f"its header is not that of a safetensors file ({type(error).__name__}: {error})")
        if size != data_start + data_end:
            state = "truncated" if size < data_start + data_end else "too long"
            self._broken(f"{state}: it has {size} bytes, its header describes {data_start + data_end}")
        return tensors

    def read_tensors(self, expected: dict[str, TensorInfo]) -> dict[str, Tensor]:
        """The tensors of the weights file, on the CPU, as stored.

        Parameters
        ----------
        expected
            What :meth:`read_header` gave; the file must still say the same.

        Raises
        ------
        InvalidArgumentError
            The file's inner structure is broken, or it changed since the header was read.
        """
        size = self._regular_size(self._weights_path, WEIGHTS_FILE)
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load(
                self._read(self._weights_path, WEIGHTS_FILE, size)
            )
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            self._broken(f"it cannot be read as safetensors ({error})")
        if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != {
            key: info.shape for key, info in expected.items()
        }:
            self._broken("it changed while it was read")
        return tensors

    def _broken(self, text: str) -> NoReturn:
        self._problems.fail(f"{WEIGHTS_FILE} is broken: {text}; copy or save the adapter again, completely")

    def _regular_size(self, path: str, name: str) -> int:
        try:
            status = os.stat(path)
        except OSError as error:
            self._problems.fail(f"{name}: {error.strerror}")
        # Opening a pipe would wait for a writer for ever, a device has no end.
        if not stat.S_ISREG(status.st_mode):
            self._problems.fail(f"{name} is not a regular file")
        return status.st_size

    def _read(self, path: str, name: str, num_bytes: int) -> bytes:
        try:
            with open(path, "rb") as file:
                return file.read(num_bytes)
        except OSError as error:
            self._problems.fail(f"{name}: {error.strerror}")
