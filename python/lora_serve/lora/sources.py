"""From what a user gives as an adapter's path to the local folder that it is read from.

What is tried, in this order, and nothing else:

1. ``hf://org/name`` and ``hf://org/name@revision`` name the hub, if the operator allows it.
2. Any other ``scheme://...`` goes to the resolvers that the operator has chosen.
3. A path that says where it is (``/...``, ``./...``, ``../...``, ``~/...``) is local.
4. ``org/name`` and ``org/name@revision`` name the hub where it is allowed. A local folder of that name makes
   the reference ambiguous: it is refused, so that neither a folder in the working directory nor a stranger's
   repository can take the place of what was meant.
5. Anything else is a local folder if there is one, and else goes to the resolvers.

Local paths are held to the allowed roots. What the hub or a resolver gives is held to the folder that it gave
(users cannot name that folder: for them the roots are all there is).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.lora.allowed_roots import AllowedRoots
from lora_serve.lora.hub import Download, HubReference, download_adapter, parse_hub_reference
from lora_serve.lora.resolvers import load_resolvers

HUB_SCHEME = "hf://"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_EXPLICIT_STARTS = (os.sep, f".{os.sep}", f"..{os.sep}", f"~{os.sep}")
_EXPLICIT = (".", "..", "~")


def may_be_local(path: str, *, allow_hub: bool) -> bool:
    """Tell whether `AdapterSources` may look for a path on this machine's disks.

    Parameters
    ----------
    path
        What the user gave.
    allow_hub
        As of `AdapterSources`.
    """
    if _SCHEME.match(path):
        return False
    return not allow_hub or parse_hub_reference(path) is None


@dataclass(frozen=True)
class AdapterFolder:
    """A local folder with an adapter, and how far its links may lead.

    Parameters
    ----------
    path
        Real path.
    allowed
        Where its files may really lie.
    """

    path: str
    allowed: AllowedRoots

    def resolve(self, path: str) -> str:
        """The real path behind a path in the folder.

        Raises
        ------
        InvalidArgumentError
            It leads outside what is allowed.
        """
        return self.allowed.resolve(path)


class AdapterSources:
    """Finds the folder of an adapter, and brings it to this machine where it is elsewhere.

    Owns nothing on disk: what the hub's cache or a resolver keeps is theirs. Thread-safe.

    Parameters
    ----------
    allowed_roots
        Folders that local adapters may come from; None = any.
    allow_hub
        True: adapters may be downloaded from the Hugging Face hub.
    resolvers
        Names of the plug-ins to ask, in this order.
    download
        In place of ``huggingface_hub.snapshot_download``, for tests.

    Raises
    ------
    InvalidArgumentError
        A root is not a folder, or a plug-in cannot be loaded.
    """

    def __init__(
        self,
        *,
        allowed_roots: Sequence[str] | None = None,
        allow_hub: bool = False,
        resolvers: Sequence[str] = (),
        download: Download | None = None,
    ) -> None:
        self._root_paths = allowed_roots
        self._roots = AllowedRoots(allowed_roots)
        self._allow_hub = allow_hub
        self._resolvers = load_resolvers(resolvers)
        self._download = download

    def locate(self, path: str, adapter_name: str | None = None) -> AdapterFolder:
        """Find the folder; the files in it are not looked at.

        Parameters
        ----------
        path
            What the user gave; see the module for what it may be.
        adapter_name
            What the adapter is to be called, for the resolvers.

        Returns
        -------
        AdapterFolder
            A local path need not exist; a folder from elsewhere does.

        Raises
        ------
        InvalidArgumentError
            The path is none, leads outside the allowed roots, is ambiguous, or names something that its
            source does not have or that the operator has not allowed.

        Notes
        -----
        May wait for the network, so not for the step loop's thread.
        """
        if path.startswith(HUB_SCHEME):
            reference = parse_hub_reference(path.removeprefix(HUB_SCHEME))
            if reference is None:
                raise InvalidArgumentError(
                    f"adapter path {path!r} names no repository, expected {HUB_SCHEME}org/name or "
                    f"{HUB_SCHEME}org/name@revision"
                )
            return self._from_hub(reference)
        if _SCHEME.match(path):
            return self._from_resolvers(path, adapter_name)
        if path in _EXPLICIT or path.startswith(_EXPLICIT_STARTS):
            return self._from_disk(os.path.expanduser(path))
        reference = parse_hub_reference(path)
        if reference is not None and self._allow_hub:
            if self._is_local_folder(path):
                raise InvalidArgumentError(
                    f"adapter path {path!r} is ambiguous: there is a folder of this name, and it may be a "
                    f"repository of the Hugging Face hub; give './{path}' or '{HUB_SCHEME}{path}'"
                )
            return self._from_hub(reference)
        return self._from_disk_or_resolvers(path, adapter_name, may_be_on_hub=reference is not None)

    def _from_disk(self, path: str) -> AdapterFolder:
        return AdapterFolder(self._roots.resolve(path), self._roots)

    def _from_hub(self, reference: HubReference) -> AdapterFolder:
        if not self._allow_hub:
            raise InvalidArgumentError(
                f"adapter {str(reference)!r} is on the Hugging Face hub, from which nothing is downloaded "
                "here; start with --lora-allow-hub, or give a local folder"
            )
        folder, repository = download_adapter(reference, self._download)
        allowed = AllowedRoots([repository])
        return AdapterFolder(allowed.resolve(folder), allowed)

    def _from_disk_or_resolvers(
        self, path: str, adapter_name: str | None, *, may_be_on_hub: bool
    ) -> AdapterFolder:
        is_local = self._is_local_folder(path)
        if self._resolvers and not is_local:
            return self._from_resolvers(path, adapter_name)
        if may_be_on_hub and self._root_paths is None and not os.path.lexists(path):
            raise InvalidArgumentError(
                f"adapter path {path!r} does not exist; if it is a repository of the Hugging Face hub, start "
                "with --lora-allow-hub"
            )
        return self._from_disk(path)

    def _from_resolvers(self, reference: str, adapter_name: str | None) -> AdapterFolder:
        for resolver in self._resolvers:
            folder = resolver.find(reference, adapter_name)
            if folder is not None:
                within = None if self._root_paths is None else [folder, *self._root_paths]
                return AdapterFolder(os.path.realpath(folder), AllowedRoots(within))
        if not self._resolvers:
            raise InvalidArgumentError(
                f"adapter path {reference!r} is a URI, and no resolver is there for it; start with "
                "--lora-resolver, or give a local folder"
            )
        asked = ", ".join(resolver.name for resolver in self._resolvers)
        raise InvalidArgumentError(
            f"adapter path {reference!r} is neither a local folder nor known to a resolver (asked: {asked})"
        )

    def _is_local_folder(self, path: str) -> bool:
        """True for a folder in the allowed roots; what is outside them is as if it were not there."""
        try:
            return os.path.isdir(self._roots.resolve(path))
        except InvalidArgumentError:
            return False
