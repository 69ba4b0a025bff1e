"""Plug-ins that turn references which are no paths, such as ``s3://bucket/sql``, into local folders.

A plug-in is a Python package with an entry point in the group ``lora_serve.adapter_resolvers``. The operator
chooses it by the entry point's name; what is merely installed is never imported.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from lora_serve.common.errors import InvalidArgumentError

ENTRY_POINT_GROUP = "lora_serve.adapter_resolvers"

logger = logging.getLogger(__name__)


class AdapterResolver(Protocol):
    """What an entry point gives: a function of this signature, or a class whose instances are called so."""

    def __call__(self, reference: str, adapter_name: str | None, /) -> str | os.PathLike[str] | None:
        """Bring an adapter to a local folder.

        Parameters
        ----------
        reference
            What the user gave as the adapter's path: a URI, or a name that is no local folder.
        adapter_name
            What the adapter is to be called; None where nobody has said.

        Returns
        -------
        str, os.PathLike or None
            Absolute path of a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, which
            stays as it is until the adapter is unloaded. None = not one of this resolver's references.

        Raises
        ------
        Exception
            Any: the load is refused with the text, under the resolver's name.

        Notes
        -----
        Called in any thread, several at once; it may take its time.
        """
        ...


@dataclass(frozen=True)
class NamedResolver:
    """A resolver and the name by which the operator chose it.

    Parameters
    ----------
    name
        Of its entry point.
    resolver
        The plug-in's object.
    """

    name: str
    resolver: AdapterResolver

    def find(self, reference: str, adapter_name: str | None) -> str | None:
        """Ask the plug-in.

        Returns
        -------
        str or None
            Absolute path of an existing folder; None where the reference is not one of its own.

        Raises
        ------
        InvalidArgumentError
            The plug-in has failed, or has given something else; names it.
        """
        try:
            found = self.resolver(reference, adapter_name)
            folder = None if found is None else os.fspath(found)
        # A plug-in that exits must not end the thread's caller.
        except (Exception, SystemExit) as error:
            logger.exception("adapter resolver %r failed on %r", self.name, reference)
            raise self._error(reference, f"{type(error).__name__}: {error}") from error
        if folder is None:
            return None
        if not isinstance(folder, str) or not os.path.isabs(folder) or not os.path.isdir(folder):
            raise self._error(reference, f"it gave {folder!r}, expected the absolute path of a folder")
        return folder

    def _error(self, reference: str, reason: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"adapter resolver {self.name!r} failed on {reference!r} ({reason})")


def load_resolvers(names: Sequence[str]) -> tuple[NamedResolver, ...]:
    """Import the plug-ins that the operator has chosen.

    Parameters
    ----------
    names
        Names of entry points in the group ``lora_serve.adapter_resolvers``.

    Raises
    ------
    InvalidArgumentError
        A name is given twice, is not installed or stands for several plug-ins, or a plug-in cannot be
        imported or made.
    """
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgumentError(f"adapter resolver {name!r} is given twice; leave one out")
    return tuple(NamedResolver(name, _load(name)) for name in names)


def _load(name: str) -> AdapterResolver:
    installed = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    found = [entry for entry in installed if entry.name == name]
    if not found:
        known = ", ".join(sorted({entry.name for entry in installed})) or "none is"
        raise InvalidArgumentError(
            f"adapter resolver {name!r} is not installed (installed: {known}); install a package with this "
            f"entry point in the group {ENTRY_POINT_GROUP!r}"
        )
    if len(found) > 1:
        raise InvalidArgumentError(
            f"adapter resolver {name!r} stands for several plug-ins: "
            f"{', '.join(sorted(entry.value for entry in found))}; uninstall all but one"
        )
    [entry] = found
    try:
        plugin = entry.load()
        resolver = plugin() if isinstance(plugin, type) else plugin
    except (Exception, SystemExit) as error:
        raise InvalidArgumentError(
            f"adapter resolver {name!r} ({entry.value}) cannot be imported ({type(error).__name__}: {error})"
        ) from error
    if not callable(resolver):
        raise InvalidArgumentError(
            f"adapter resolver {name!r} ({entry.value}) is a {type(resolver).__name__}, expected a function "
            "or a class whose instances can be called"
        )
    return cast("AdapterResolver", resolver)
