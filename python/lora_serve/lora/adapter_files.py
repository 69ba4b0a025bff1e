"""Plain reads of the two files of a PEFT directory; every way in which they can be missing or broken.

Nothing is memory-mapped: a file that shrinks under a map kills the process. Pickled checkpoints are not read
at all, because unpickling runs code.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NoReturn

from lora_serve.common.errors import AdapterSourceError, InvalidArgumentError
from lora_serve.lora.load_problems import AdapterProblemsError, LoadProblems
from lora_serve.lora.peft_config import CONFIG_FILE
from lora_serve.lora.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    HeaderError,
    TensorInfo,
    parse_header,
)

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"

# The JSON parser keeps the interpreter lock for the whole file: about 10 ms a megabyte.
MAX_CONFIG_BYTES = 4 << 20
# Non-blocking, because opening a pipe would wait for a writer for ever; the path has no links any more.
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
# Linux takes at most 1024 buffers in one read.
_MAX_BUFFERS = 512


class UnreadableFileError(AdapterProblemsError):
    """A file is there, but the system does not give its content: an error of the disk, a missing right."""


class NoAdapterError(AdapterProblemsError, AdapterSourceError):
    """The folder, or one of the two files, is not there, or leads outside what is allowed."""


class WeightsFile:
    """The weights file, open from the check of its header to the end of the read.

    Owns: the open file; close it, or use it in a ``with`` statement.
    Invariant: what is read through it is the file whose header was checked. A file of the same name that
    takes its place is not seen; one that is changed in place is noticed by :meth:`check_unchanged`.

    Parameters
    ----------
    path
        Real path.
    problems
        Where errors are noted.

    Raises
    ------
    InvalidArgumentError
        Not a regular file, or it cannot be opened.
    """

    def __init__(self, path: str, problems: LoadProblems) -> None:
        self._problems = problems
        self._file = open_regular(path, WEIGHTS_FILE, problems)
        self._status = os.fstat(self._file.fileno())
        self._header = b""

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; closing it twice is nothing."""
        self._file.close()

    @property
    def num_bytes(self) -> int:
        """Size of the file when it was opened."""
        return self._status.st_size

    def read_header(self) -> bytes:
        """The file's bytes ahead of its tensors.

        Raises
        ------
        InvalidArgumentError
            Not a safetensors file, or it ends before, or it cannot be read.
        """
        prefix = self._read(LENGTH_BYTES)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < LENGTH_BYTES or not 2 <= header_bytes <= MAX_HEADER_BYTES:
            self._broken(f"no safetensors header in its {self.num_bytes} bytes")
        data_start = LENGTH_BYTES + header_bytes
        if self.num_bytes < data_start:
            self._broken(f"truncated: it has {self.num_bytes} bytes, its header alone takes {data_start}")
        self._header = self._read(data_start)
        return self._header

    def parse_header(self) -> dict[str, TensorInfo]:
        """The tensors that the header promises, by key; checked against the file's size.

        Raises
        ------
        InvalidArgumentError
            What was read is not a safetensors header, or the file is truncated.
        """
        try:
            tensors, expected_size = parse_header(self._header)
        except HeaderError as error:
            self._broken(f"its header is not that of a safetensors file ({error})")
        if self.num_bytes != expected_size:
            state = "truncated" if self.num_bytes < expected_size else "too long"
            self._broken(f"{state}: it has {self.num_bytes} bytes, its header describes {expected_size}")
        return tensors

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill buffers, one after another, with the bytes from ``offset`` on; safe in several threads.

        Raises
        ------
        InvalidArgumentError
            The file ends before, so it is not what it was; or it cannot be read.
        """
        left = list(buffers)
        while left:
            try:
                count = os.preadv(self._file.fileno(), left[:_MAX_BUFFERS], offset)
            except OSError as error:
                _fail_to_read(WEIGHTS_FILE, self._problems, error)
            if count == 0:
                self._changed()
            offset += count
            while left and count >= left[0].nbytes:
                count -= left.pop(0).nbytes
            if count:
                left[0] = left[0][count:]

    def check_unchanged(self) -> None:
        """Compare size, time of change and header with what was checked.

        Raises
        ------
        InvalidArgumentError
            Something has written to the file since.
        """
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            self._changed()
        # The clock of a file system ticks in milliseconds.
        if self._read(len(self._header)) != self._header:
            self._changed()

    def _read(self, num_bytes: int) -> bytes:
        return _read_start(self._file, num_bytes, WEIGHTS_FILE, self._problems)

    def _changed(self) -> NoReturn:
        self._broken("it changed while it was read")

    def _broken(self, text: str) -> NoReturn:
        self._problems.fail(f"{WEIGHTS_FILE} is broken: {text}; copy or save the adapter again, completely")


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
    NoAdapterError
        The directory or one of its two files is missing, or leads outside what is allowed.
    """

    def __init__(self, directory: str, problems: LoadProblems, resolve: Callable[[str], str]) -> None:
        self._problems = problems
        try:
            _require_files(directory, problems)
            self._config_path = resolve(os.path.join(directory, CONFIG_FILE))
            self._weights_path = resolve(os.path.join(directory, WEIGHTS_FILE))
        except InvalidArgumentError as error:
            raise NoAdapterError(str(error), getattr(error, "problems", ())) from error

    def read_config(self) -> bytes:
        """The content of ``adapter_config.json``.

        Raises
        ------
        InvalidArgumentError
            Not a regular file, too large, or an error while reading.
        """
        with open_regular(self._config_path, CONFIG_FILE, self._problems) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_CONFIG_BYTES:
                self._problems.fail(f"{CONFIG_FILE} has {size} bytes, expected at most {MAX_CONFIG_BYTES}")
            return _read_start(file, size, CONFIG_FILE, self._problems)

    def open_weights(self) -> WeightsFile:
        """Open ``adapter_model.safetensors``; the caller closes it.

        Raises
        ------
        InvalidArgumentError
            Not a regular file, or it cannot be opened.
        """
        return WeightsFile(self._weights_path, self._problems)


def _require_files(directory: str, problems: LoadProblems) -> None:
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


def open_regular(path: str, name: str, problems: LoadProblems) -> io.FileIO:
    """Open a regular file for reading, without waiting for whatever it may be instead.

    Parameters
    ----------
    path
        Real path.
    name
        How messages call the file.
    problems
        Where errors are noted.

    Raises
    ------
    InvalidArgumentError
        Not a regular file, or it cannot be opened.
    """
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        _fail_to_read(name, problems, error)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        problems.fail(f"{name} is not a regular file")
    return io.FileIO(descriptor)


def _fail_to_read(name: str, problems: LoadProblems, error: OSError) -> NoReturn:
    try:
        problems.fail(f"{name}: {error.strerror}")
    except AdapterProblemsError as found:
        # Removed since it was looked for, or replaced by a link.
        if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ELOOP:
            raise
        raise UnreadableFileError(str(found), found.problems) from error


def _read_start(file: io.FileIO, num_bytes: int, name: str, problems: LoadProblems) -> bytes:
    """The first bytes of a file, fewer where it ends before."""
    content = bytearray()
    while len(content) < num_bytes:
        try:
            part = os.pread(file.fileno(), num_bytes - len(content), len(content))
        except OSError as error:
            _fail_to_read(name, problems, error)
        if not part:
            break
        content += part
    return bytes(content)
