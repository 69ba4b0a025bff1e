"""Adapters from the Hugging Face hub: how they are named and downloaded, and where their links may lead."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.lora.adapter_files import WEIGHTS_FILE
from lora_serve.lora.peft_config import CONFIG_FILE

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,254}"
_REFERENCE = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>{_REVISION}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = [CONFIG_FILE, WEIGHTS_FILE]
# The cache keeps what a revision stands for in a file of that name, and writes "/" of a repository as "--".
_FORBIDDEN_IN_REPO = ("..", "--")
_FORBIDDEN_PARTS_OF_REVISION = ("", ".", "..")

Download = Callable[..., str]
"""``huggingface_hub.snapshot_download``: repository id, ``revision`` and ``allow_patterns`` to a folder."""


@dataclass(frozen=True)
class HubReference:
    """A repository of the hub, at one revision.

    Parameters
    ----------
    repo_id
        Such as ``org/name``.
    revision
        Branch, tag, ``refs/pr/N`` or commit; None = the repository's default branch.
    """

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


def parse_hub_reference(text: str) -> HubReference | None:
    """Read ``org/name`` or ``org/name@revision``; None where the text has another shape."""
    match = _REFERENCE.fullmatch(text)
    if match is None or any(part in match["repo"] for part in _FORBIDDEN_IN_REPO):
        return None
    revision = match["revision"]
    if revision is not None and any(part in _FORBIDDEN_PARTS_OF_REVISION for part in revision.split("/")):
        return None
    return HubReference(match["repo"], revision)


def download_adapter(reference: HubReference, download: Download | None = None) -> tuple[str, str]:
    """Bring the two files of an adapter to the hub's local cache.

    Parameters
    ----------
    reference
        What to download.
    download
        In place of ``huggingface_hub.snapshot_download``, for tests.

    Returns
    -------
    tuple of (str, str)
        The folder with the two files, and the folder of the repository in the cache: links of the first lead
        into the second and never out of it.

    Raises
    ------
    InvalidArgumentError
        The hub or the cache does not give it; says why.

    Notes
    -----
    Waits for the network. What a branch stands for is asked again with every call; a commit is not. Without a
    network the cache decides.
    """
    if download is None:
        from huggingface_hub import snapshot_download

        download = snapshot_download
    try:
        folder = _find_commit(reference, download) or download(
            reference.repo_id, revision=reference.revision, allow_patterns=_FILES
        )
    except Exception as error:  # the library raises its own, httpx's and OSError, by version
        raise InvalidArgumentError(f"adapter {str(reference)!r} {_explain(error)}") from error
    parent = os.path.dirname(folder)
    # In the cache: models--org--name/snapshots/<commit>, whose files are links to models--org--name/blobs.
    return folder, os.path.dirname(parent) if os.path.basename(parent) == "snapshots" else folder


def _find_commit(reference: HubReference, download: Download) -> str | None:
    """The folder of a commit that is in the cache, complete; the hub has nothing to add to it.

    The library itself would ask, and fail without a network.
    """
    if reference.revision is None or not _COMMIT.fullmatch(reference.revision):
        return None
    try:
        folder = download(
            reference.repo_id, revision=reference.revision, allow_patterns=_FILES, local_files_only=True
        )
    except Exception:  # then the download says what is wrong
        return None
    return folder if all(os.path.exists(os.path.join(folder, file)) for file in _FILES) else None


def _explain(error: Exception) -> str:
    from huggingface_hub import errors

    reason = (str(error).splitlines() or [""])[0]
    if isinstance(error, errors.GatedRepoError):
        return "is gated on the Hugging Face hub: ask for access there, and set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "is on the Hugging Face hub, but not this revision; give a branch, a tag or a commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is not on the Hugging Face hub, or is private: check the name, and HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "is not in the local cache, and the Hugging Face hub cannot be asked: check the network and "
            f"HF_HUB_OFFLINE ({reason})"
        )
    return f"could not be downloaded from the Hugging Face hub ({type(error).__name__}: {reason})"
