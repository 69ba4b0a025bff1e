"""What a folder of adapters looks like on disk at one moment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lora_serve.lora.adapter_files import WEIGHTS_FILE
from lora_serve.lora.peft_config import CONFIG_FILE


@dataclass(frozen=True)
class FileStamp:
    """What changes when somebody writes to a file or puts another one in its place.

    Parameters
    ----------
    device, inode
        Which file it is.
    size
        Bytes.
    mtime_ns, ctime_ns
        Last change of the content; of anything, which copies that keep the first cannot set.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class FolderFiles:
    """The two files of one subfolder; None for one that is not there.

    Parameters
    ----------
    config
        Of ``adapter_config.json``.
    weights
        Of ``adapter_model.safetensors``.
    """

    config: FileStamp | None = None
    weights: FileStamp | None = None

    @property
    def is_complete(self) -> bool:
        """True when both are there."""
        return self.config is not None and self.weights is not None

    @property
    def is_empty(self) -> bool:
        """True when neither is there."""
        return self.config is None and self.weights is None


FolderScan = dict[str, FolderFiles | None]
"""Subfolder's name to its files; None where they cannot be looked at now, which says nothing about them."""


def scan_folder(path: str) -> FolderScan:
    """Look at every subfolder once.

    Parameters
    ----------
    path
        The folder; links in it to folders count as subfolders. Names that begin with a dot do not.

    Raises
    ------
    OSError
        The folder itself cannot be read.
    """
    scan: FolderScan = {}
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    scan[entry.name] = FolderFiles(
                        _stamp(os.path.join(entry.path, CONFIG_FILE)),
                        _stamp(os.path.join(entry.path, WEIGHTS_FILE)),
                    )
            except OSError:
                scan[entry.name] = None
    return scan


def _stamp(path: str) -> FileStamp | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return FileStamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
