"""Which adapters of a watched folder are to be loaded, reloaded and unloaded: decided without clock or I/O.

Scans go in, one a poll; actions come out. The rules:

- A subfolder is an adapter of its name once both files are there and the same in two polls in a row. A
  half-written one is left alone for as long as it changes.
- It is loaded again, in place, when its files have changed and come to rest again. While one of the two is
  missing, what was loaded goes on serving.
- It is unloaded when the subfolder, or both of its files, are gone in two polls in a row.
- What cannot be loaded is tried again when its files change, and not before.
- A name that somebody loads, replaces or unloads by hand is theirs: the folder leaves it alone until the
  subfolder's files change, and then takes it only if nothing is loaded under it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora_serve.lora.adapter_files import WEIGHTS_FILE
from lora_serve.lora.folder_scan import FolderFiles, FolderScan
from lora_serve.lora.peft_config import CONFIG_FILE

_NOTHING = FolderFiles()


@dataclass(frozen=True)
class FolderAction:
    """Something to be done for one subfolder; until its outcome is told, nothing else is asked for it.

    Parameters
    ----------
    name
        Of the subfolder and the adapter.
    kind
        What to do. "reload" replaces the adapter that the folder has loaded.
    files
        The state of the files that asks for it.
    """

    name: str
    kind: Literal["load", "reload", "unload"]
    files: FolderFiles


@dataclass
class FolderChanges:
    """What one poll has brought.

    Parameters
    ----------
    actions
        To be begun now, in any order.
    notes
        Sentences for the log; each is said once for one state of the files.
    """

    actions: list[FolderAction] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Subfolder:
    """What is known of one subfolder.

    Parameters
    ----------
    seen
        Its files at the last poll; None = unknown.
    handled
        The state of its files that was loaded, has failed, or was left alone for a reason.
    adapter_id
        The generation that serves because of this folder; None = none does.
    is_busy
        An action is under way.
    is_refused
        Its name can be no adapter's.
    is_unreadable
        The log knows that it cannot be looked at.
    """

    seen: FolderFiles | None = None
    handled: FolderFiles | None = None
    adapter_id: int | None = None
    is_busy: bool = False
    is_refused: bool = False
    is_unreadable: bool = False


class WatchedFolder:
    """The subfolders of one folder, and what was done about them.

    Deliberately does not know: files, the engine, time, what the log is.
    Invariants: at most one action a name is under way; "reload" and "unload" are asked only for a generation
    that an earlier action of this object has loaded and that nobody has replaced or unloaded since.

    Order of calls, a poll: :meth:`finish` for every action that has ended; look at the disk; nothing more if
    it :meth:`is_at_rest`; look at the engine; :meth:`update`. In another order an adapter that has just been
    loaded would look as if somebody had unloaded it.

    Parameters
    ----------
    why_no_name
        Gives the reason why a text cannot be an adapter's name, None if it can.
    """

    def __init__(self, why_no_name: Callable[[str], str | None]) -> None:
        self._why_no_name = why_no_name
        self._subfolders: dict[str, _Subfolder] = {}
        self._last_scan: FolderScan | None = None
        self._is_at_rest = False

    def is_at_rest(self, scan: FolderScan) -> bool:
        """True when :meth:`update` would ask for nothing, whatever serves: the engine need not be asked.

        Two updates have then seen this scan, and no action has ended since.
        """
        return self._is_at_rest and scan == self._last_scan

    def update(self, scan: FolderScan, serving: Mapping[str, int]) -> FolderChanges:
        """Take in one poll.

        Parameters
        ----------
        scan
            Subfolder to its files; None = unknown at present.
        serving
            Adapter name to the generation that new requests for it get.
        """
        changes = FolderChanges()
        self._is_at_rest = scan == self._last_scan
        self._last_scan = dict(scan)
        for name in sorted({*self._subfolders, *scan}):
            subfolder = self._subfolders.setdefault(name, _Subfolder())
            self._update_one(name, subfolder, scan.get(name, _NOTHING), serving, changes)
        return changes

    def finish(self, action: FolderAction, adapter_id: int | None) -> None:
        """Take in the end of an action.

        Parameters
        ----------
        action
            As :meth:`update` gave it.
        adapter_id
            The generation that serves for the folder now: after a load or reload the one that was loaded, or
            None if that has failed or the name has turned out to be somebody else's; of no meaning for an
            unload.
        """
        self._is_at_rest = False
        subfolder = self._subfolders[action.name]
        subfolder.is_busy = False
        if action.kind == "unload":
            subfolder.adapter_id = None
            subfolder.handled = None
            return
        subfolder.handled = action.files
        if adapter_id is not None:
            subfolder.adapter_id = adapter_id

    def forget_engine(self, served: Collection[str]) -> None:
        """Take in that nothing serves any more, and that the actions under way were dropped.

        These actions, and what served, are asked for at the next update if the files are the same then as at
        the last one. The rest is left alone until its files change, as before: what has failed, and what
        somebody has unloaded.

        Parameters
        ----------
        served
            Names of the adapters that served from this folder.
        """
        self._is_at_rest = False
        for name, subfolder in self._subfolders.items():
            if name in served:
                subfolder.handled = None
            subfolder.adapter_id = None
            subfolder.is_busy = False

    def _update_one(
        self,
        name: str,
        subfolder: _Subfolder,
        files: FolderFiles | None,
        serving: Mapping[str, int],
        changes: FolderChanges,
    ) -> None:
        is_settled = files is not None and files == subfolder.seen
        subfolder.seen = files
        if files is None and not subfolder.is_unreadable:
            changes.notes.append(f"subfolder {name!r} cannot be read; what it had loaded is kept")
        subfolder.is_unreadable = files is None
        if subfolder.is_busy:
            return
        is_own = subfolder.adapter_id is not None and serving.get(name) == subfolder.adapter_id
        if subfolder.adapter_id is not None and not is_own:
            subfolder.adapter_id = None
            changes.notes.append(
                f"adapter {name!r} was replaced or unloaded by somebody else; it is left alone"
            )
        if files is None or not is_settled or (files == subfolder.handled and files.is_complete):
            return
        if files.is_empty:
            if is_own:
                _begin(FolderAction(name, "unload", files), subfolder, changes)
            else:
                del self._subfolders[name]
        elif not files.is_complete:
            _note_incomplete(name, subfolder, files, changes)
        elif is_own:
            _begin(FolderAction(name, "reload", files), subfolder, changes)
        else:
            self._load(name, subfolder, files, serving, changes)

    def _load(
        self,
        name: str,
        subfolder: _Subfolder,
        files: FolderFiles,
        serving: Mapping[str, int],
        changes: FolderChanges,
    ) -> None:
        reason = self._why_no_name(name)
        if reason is not None:
            if not subfolder.is_refused:
                changes.notes.append(f"subfolder {name!r} is not loaded: {reason}")
            subfolder.is_refused = True
        elif name in serving:
            subfolder.handled = files
            changes.notes.append(
                f"subfolder {name!r} is not loaded: somebody else has loaded an adapter of this name"
            )
        else:
            _begin(FolderAction(name, "load", files), subfolder, changes)


def _begin(action: FolderAction, subfolder: _Subfolder, changes: FolderChanges) -> None:
    subfolder.is_busy = True
    changes.actions.append(action)


def _note_incomplete(name: str, subfolder: _Subfolder, files: FolderFiles, changes: FolderChanges) -> None:
    if files == subfolder.handled:
        return
    subfolder.handled = files
    missing = CONFIG_FILE if files.config is None else WEIGHTS_FILE
    then = "what it had loaded is kept" if subfolder.adapter_id is not None else "it is not loaded"
    changes.notes.append(f"subfolder {name!r} has no {missing}; {then}")
