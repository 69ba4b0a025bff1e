"""Keeps adapter paths inside the folders that the operator allows, whatever links and ``..`` they contain."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lora_serve.common.errors import InvalidArgumentError


class AllowedRoots:
    """Real-path containment of adapter paths.

    Parameters
    ----------
    roots
        Folders that adapters may come from, resolved once, here. None: any path is allowed. Empty: none is.

    Raises
    ------
    InvalidArgumentError
        A root is not an existing folder.
    """

    def __init__(self, roots: Sequence[str] | None) -> None:
        self._roots: tuple[str, ...] | None = None
        if roots is None:
            return
        resolved = []
        for root in roots:
            real = _real_path(root)
            if not root or not os.path.isdir(real):
                raise InvalidArgumentError(
                    f"lora_allowed_roots has {root!r}, which is not a folder; create it or leave it out"
                )
            resolved.append(real)
        self._roots = tuple(resolved)

    def resolve(self, path: str) -> str:
        """The real path behind ``path``, links and ``..`` resolved, if it is in an allowed root.

        Parameters
        ----------
        path
            Absolute, or relative to the working directory. It need not exist. Use the returned path from
            here on: resolving the original again could give another file.

        Raises
        ------
        InvalidArgumentError
            The path is empty, cannot be a path, or leads outside every allowed root. The message is the same
            whether or not the path exists.
        """
        real = _real_path(path)
        if self._roots is None or any(_is_within(real, root) for root in self._roots):
            return real
        raise InvalidArgumentError(
            f"adapter path {path!r} is outside the allowed roots; put the adapter under one of the folders "
            "given with --lora-allowed-roots"
        )


def _is_within(real: str, root: str) -> bool:
    try:
        return os.path.commonpath((real, root)) == root
    except ValueError:  # different drives
        return False


def _real_path(path: str) -> str:
    if not path:
        raise InvalidArgumentError("adapter path is empty; give the folder that holds adapter_config.json")
    try:
        return os.path.realpath(path)
    except (ValueError, OSError) as error:
        raise InvalidArgumentError(f"adapter path {path!r:.200} is not a path ({error})") from error
