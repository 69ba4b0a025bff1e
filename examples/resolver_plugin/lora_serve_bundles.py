"""Resolves `bundle://NAME` to an adapter that lies in NAME.zip, in the folder that LORA_BUNDLES names.

    pip install ./examples/resolver_plugin
    LORA_BUNDLES=/bundles lora-serve serve MODEL --lora-resolver bundles --lora-modules sql=bundle://sql

A plug-in for object storage has the same shape: the download takes the place of the zip file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from pathlib import Path

SCHEME = "bundle://"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def resolve(reference: str, _adapter_name: str | None) -> str | None:
    """Unpack a bundle.

    Parameters
    ----------
    reference : str
        What was given as the adapter's path.
    _adapter_name : str or None
        What the adapter is to be called; not needed here.

    Returns
    -------
    str or None
        Absolute path of the unpacked adapter; None = another resolver's reference.

    Raises
    ------
    ValueError
        The name is not that of a bundle; the load is then refused with this text.
    """
    if not reference.startswith(SCHEME):
        return None
    folder = Path(os.environ["LORA_BUNDLES"])
    bundle = folder / f"{reference.removeprefix(SCHEME)}.zip"
    if bundle not in folder.glob("*.zip"):  # Neither '..' nor a path leads out of the folder.
        raise ValueError(f"there is no bundle {bundle.name} in LORA_BUNDLES; put it there")
    # A folder for each content: it never changes while an adapter that was read from it serves.
    unpacked = folder / "unpacked" / hashlib.sha256(bundle.read_bytes()).hexdigest()
    if not unpacked.exists():
        unpacked.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=unpacked.parent) as partial, zipfile.ZipFile(bundle) as archive:
            complete = Path(partial) / "complete"
            for name in FILES:
                archive.extract(name, complete)
            try:
                complete.rename(unpacked)  # Whole or not at all: several threads may be here at once.
            except OSError:
                if not unpacked.exists():
                    raise
    return str(unpacked.resolve())
