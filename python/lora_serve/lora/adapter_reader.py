"""Reads adapters from disk into host memory, in any thread."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from lora_serve.common.errors import (
    AdapterConflictError,
    AdapterSourceError,
    InvalidArgumentError,
    LoraServeError,
)
from lora_serve.layers.linear import LoRATarget
from lora_serve.lora.adapter_files import UnreadableFileError
from lora_serve.lora.adapter_layout import AdapterLayout
from lora_serve.lora.host_block import HostBlock
from lora_serve.lora.host_pool import HostPool
from lora_serve.lora.peft_adapter import PeftChecker
from lora_serve.lora.peft_modules import AdapterLimits
from lora_serve.lora.peft_reader import read_into
from lora_serve.lora.sources import AdapterFolder, AdapterSources

if TYPE_CHECKING:
    from lora_serve.lora.device_adapters import DeviceDescription

MAX_READ_THREADS = 3
"""Threads that digest what was read and bring it into blocks, at most; one core is left to the step loop.

Each more of them waits for the interpreter lock as well.
"""
_NICENESS = 15
"""How far these threads step back; see `_step_back`."""


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """One adapter as it was read: what it is, and its weights until it is released.

    As a context manager it releases itself.

    Parameters
    ----------
    folder
        Where it was read from.
    layout
        Where each matrix lies in the block.
    content_digest
        Hex SHA-256 of what the adapter computes.
    block
        Its weights, leased; None where only the rest is of interest.
    load_ms
        How long each stage of the load took: "locate" (a download, perhaps), "check", "room" (waiting for
        host memory), "read".
    description
        What its layout means on the device, where that was worked out already.
    """

    folder: AdapterFolder
    layout: AdapterLayout
    content_digest: str
    block: HostBlock | None
    load_ms: Mapping[str, float]
    description: DeviceDescription | None = None

    def __enter__(self) -> HostAdapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """End the lease; a block that nobody kept is free then. A second call is nothing."""
        if self.block is not None:
            self.block.release()

    @property
    def path(self) -> str:
        """Real path of the directory that it was read from."""
        return self.folder.path

    @property
    def lora_rank(self) -> int:
        """The largest rank of its modules."""
        return self.layout.lora_rank

    @property
    def num_bytes(self) -> int:
        """Bytes of its block."""
        return self.layout.num_bytes


class FolderChange(str):
    """Why an adapter cannot be brought back: its folder does not hold any more what was loaded from there.

    A text as other reasons are, so that it goes with them from thread to thread; but this one is not the
    server's fault.
    """

    __slots__ = ()


def describe_error(error: Exception) -> str:
    """What an adapter's owner should read: the message of our own errors, else the type as well."""
    if isinstance(error, AdapterConflictError):
        return FolderChange(error)
    return str(error) if isinstance(error, LoraServeError) else f"{type(error).__name__}: {error}"


def release_unwanted(read: Future[HostAdapter]) -> None:
    """Free what a read gives that nobody waits for any more; a callback of its future."""
    if not read.cancelled() and read.exception() is None:
        read.result().release()


def never() -> bool:
    """False: nothing is cancelled."""
    return False


class AdapterReader:
    """Finds, checks and reads adapters.

    Owns: the threads that read tensors. Thread-safe.

    Parameters
    ----------
    targets
        Module paths of the model that may have an adapter.
    fused_targets
        Module paths that stand for several of them, in the order of their output features.
    limits
        What is accepted, and the dtype to store.
    pool
        Host memory for the blocks.
    sources
        Where adapters may come from.
    num_threads
        Threads that digest tensors and bring them into blocks; None = by the number of cores, benchmarks try
        others.
    """

    def __init__(
        self,
        targets: Mapping[str, LoRATarget],
        fused_targets: Mapping[str, Sequence[str]],
        limits: AdapterLimits,
        pool: HostPool,
        sources: AdapterSources,
        *,
        num_threads: int | None = None,
    ) -> None:
        self._checker = PeftChecker(targets, limits, fused_targets)
        self._pool = pool
        self._sources = sources
        if num_threads is None:
            num_threads = min(MAX_READ_THREADS, max(1, len(os.sched_getaffinity(0)) - 1))
        self._threads = ThreadPoolExecutor(
            num_threads, thread_name_prefix="lora-serve-tensors", initializer=_step_back
        )
        self._is_closed = False

    def read(
        self, path: str, name: str | None = None, is_cancelled: Callable[[], bool] = never
    ) -> HostAdapter:
        """Read and validate a PEFT directory into host memory; slow, and waits for room if it must.

        Room is made by `HostPool.make_room`, so somebody must call it meanwhile.

        Parameters
        ----------
        path
            Where the adapter is, as `AdapterSources.locate` takes it.
        name
            How messages name the adapter; its path where None.
        is_cancelled
            Asked now and then; once it says so, the read ends.

        Returns
        -------
        HostAdapter
            Its block is leased.

        Raises
        ------
        AdapterSourceError
            The path is outside the allowed roots, or there is no adapter.
        InvalidArgumentError
            The adapter cannot be read or applied exactly.
        CapacityError
            It is larger than all of the host memory for adapters.
        LoadCancelledError
            ``is_cancelled`` said so, or the memory was closed meanwhile.
        """
        begin = time.monotonic()
        try:
            folder = self._sources.locate(path, name)
        except InvalidArgumentError as error:
            raise AdapterSourceError(str(error)) from error
        return self._read(folder, name, {"locate": _ms_since(begin)}, is_cancelled, self._reserve)

    def _reserve(self, layout: AdapterLayout, is_cancelled: Callable[[], bool]) -> HostBlock:
        return self._pool.reserve(layout.num_bytes, is_cancelled)

    def _read(
        self,
        folder: AdapterFolder,
        name: str | None,
        load_ms: dict[str, float],
        is_cancelled: Callable[[], bool],
        take_room: Callable[[AdapterLayout, Callable[[], bool]], HostBlock],
    ) -> HostAdapter:
        def is_over() -> bool:
            return self._is_closed or is_cancelled()

        begin = time.monotonic()
        with self._checker.check(folder.path, name=name, resolve=folder.resolve) as checked:
            load_ms["check"], begin = _ms_since(begin), time.monotonic()
            block = take_room(checked.layout, is_over)
            try:
                load_ms["room"], begin = _ms_since(begin), time.monotonic()
                digest = read_into(checked, block.tensor, threads=self._threads, is_cancelled=is_over)
            except BaseException:
                block.release()
                raise
        load_ms["read"] = _ms_since(begin)
        return HostAdapter(folder, checked.layout, digest, block, load_ms)

    def read_again(
        self,
        folder: AdapterFolder,
        layout: AdapterLayout,
        content_digest: str,
        room: HostBlock,
        is_cancelled: Callable[[], bool] = never,
    ) -> HostAdapter:
        """Read what was read from a folder before.

        Parameters
        ----------
        folder, layout, content_digest
            Of what was read.
        room
            Where to read it, of the layout's size; released if the read fails.
        is_cancelled
            As in :meth:`read`.

        Raises
        ------
        AdapterConflictError
            The folder does not hold the same content any more: another one, or none that can be read.
        UnreadableFileError
            The system does not give the content of a file.
        LoadCancelledError
            As in :meth:`read`.
        """

        def take_room(found: AdapterLayout, is_over: Callable[[], bool]) -> HostBlock:  # noqa: ARG001
            if found != layout:
                raise _changed(folder, content_digest, "holds other modules, ranks or scalings")
            return room

        try:
            adapter = self._read_same(folder, content_digest, is_cancelled, take_room)
            if (adapter.content_digest, adapter.layout) != (content_digest, layout):
                adapter.release()
                raise _changed(folder, content_digest, f"holds content {adapter.content_digest}")
        except BaseException:
            room.release()
            raise
        return adapter

    def _read_same(
        self,
        folder: AdapterFolder,
        content_digest: str,
        is_cancelled: Callable[[], bool],
        take_room: Callable[[AdapterLayout, Callable[[], bool]], HostBlock],
    ) -> HostAdapter:
        try:
            return self._read(folder, None, {}, is_cancelled, take_room)
        except UnreadableFileError:
            raise
        except InvalidArgumentError as error:
            raise _changed(folder, content_digest, f"cannot be read any more ({error})") from error

    def close(self) -> None:
        """End the threads; reads that run end with LoadCancelledError. Twice is nothing."""
        self._is_closed = True
        self._threads.shutdown(wait=False)


def _changed(folder: AdapterFolder, content_digest: str, found: str) -> AdapterConflictError:
    return AdapterConflictError(
        f"{folder.path!r} {found}, expected content {content_digest}, which was loaded from there: "
        "the folder was changed; load it again, and write new versions to new folders"
    )


def _step_back() -> None:
    """Let the calling thread leave its core to whoever else wants it, such as the step loop.

    Threads that copy and hash never pause by themselves, so on a machine with few cores the loop would be
    interrupted in the midst of a step. Not for threads that mostly run Python code: one that cannot go on
    while it has the interpreter lock holds up everybody.
    """
    if sys.platform == "linux":  # Elsewhere it would be all threads of the process.
        thread_id = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread_id)
        os.setpriority(os.PRIO_PROCESS, thread_id, min(19, niceness + _NICENESS))


def _ms_since(begin_s: float) -> float:
    return 1e3 * (time.monotonic() - begin_s)
