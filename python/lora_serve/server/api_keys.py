"""Which API keys a server knows, and whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.server.caller import ANYBODY, Caller


class KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of a file of keys.

    Parameters
    ----------
    name : str
        Whose key it is; several keys may have one name, such as an old and a new one.
    key : str
        The key itself.
    adapters : list of str or None
        The only adapters that exist for it, beside the base model; absent = all.
    group : str or None
        Whose cached prefixes it shares; absent = its name for a key with `adapters`, else everybody's.
    admin : bool
        It may load and unload adapters.
    """

    name: str
    key: str
    adapters: list[str] | None = None
    group: str | None = None
    admin: bool = False


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of keys."""

    keys: list[KeyEntry]


@dataclass(frozen=True)
class ApiKeys:
    """The keys of a server.

    Parameters
    ----------
    full : sequence of str
        Keys without restrictions. They may load adapters unless there is an admin key.
    admin : sequence of str
        Keys that may do everything.
    entries : sequence of KeyEntry
        Keys from a file.

    Raises
    ------
    InvalidArgumentError
        A key is empty, unprintable or there twice, or an entry contradicts itself.
    """

    full: Sequence[str] = ()
    admin: Sequence[str] = ()
    entries: Sequence[KeyEntry] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for key in self.full:
            check_key(key, "--api-key")
        for key in self.admin:
            check_key(key, "--admin-api-key")
        for entry in self.entries:
            _check_entry(entry)
        keys = [*dict.fromkeys(self.full), *self.admin, *(entry.key for entry in self.entries)]
        if len(set(keys)) != len(keys):
            raise InvalidArgumentError(
                "an API key is there twice with different rights; give each of --api-key, --admin-api-key "
                "and --api-keys-file keys of its own"
            )

    @property
    def asks_for_key(self) -> bool:
        """True when a request without a key is refused: an admin key alone leaves the rest open."""
        return bool(self.full or self.entries)

    @property
    def nobody(self) -> Caller:
        """Who asks without a key, where none is asked for."""
        return Caller(name=ANYBODY.name, may_load=False) if self._has_admin else ANYBODY

    def callers(self) -> dict[str, Caller]:
        """Give who shows each key."""
        callers: dict[str, Caller] = {}
        for number, key in enumerate(dict.fromkeys(self.full), start=1):
            callers[key] = Caller(name=f"api-key-{number}", may_load=not self._has_admin)
        for number, key in enumerate(self.admin, start=1):
            callers[key] = Caller(name=f"admin-{number}")
        for entry in self.entries:
            is_restricted = entry.adapters is not None
            callers[entry.key] = Caller(
                name=entry.name,
                group=entry.name if entry.group is None and is_restricted else entry.group,
                adapters=None if entry.adapters is None else frozenset(entry.adapters),
                may_load=entry.admin or not (self._has_admin or is_restricted or entry.group is not None),
            )
        return callers

    @property
    def _has_admin(self) -> bool:
        return bool(self.admin) or any(entry.admin for entry in self.entries)


def check_key(key: str, source: str) -> None:
    """Require a key that an HTTP header can carry; the message never shows it.

    Raises
    ------
    InvalidArgumentError
        It cannot be carried.
    """
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise InvalidArgumentError(
            "an API key is empty, or holds spaces at an end or characters that an HTTP header cannot "
            f"carry; set {source} to printable ASCII"
        )


def _check_entry(entry: KeyEntry) -> None:
    if not entry.name or not entry.name.isprintable():
        raise InvalidArgumentError(
            f"--api-keys-file has a key with the name {entry.name!r} but a name is printable and not empty"
        )
    check_key(entry.key, f"the key {entry.name!r} of --api-keys-file")
    if entry.group == "":
        raise InvalidArgumentError(f"the key {entry.name!r} has an empty group; name one, or leave it out")
    if entry.admin and (entry.adapters is not None or entry.group is not None):
        raise InvalidArgumentError(
            f"the key {entry.name!r} is an admin's but has adapters or a group, which are a tenant's; an "
            "admin key loads for everybody: take them out, or take 'admin' out"
        )


def read_key_file(path: str) -> tuple[KeyEntry, ...]:
    """Read a file of keys: JSON, {"keys": [{"name": ..., "key": ..., ...}, ...]}.

    Raises
    ------
    InvalidArgumentError
        The file cannot be read, or is no such object.
    """
    try:
        return tuple(msgspec.json.decode(Path(path).read_bytes(), type=KeyFile).keys)
    except OSError as error:
        raise InvalidArgumentError(
            f"--api-keys-file {path!r} cannot be read: {error.strerror or error}"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # msgspec's messages name fields and places, never values.
        raise InvalidArgumentError(
            f'--api-keys-file {path!r}: {error}; expected {{"keys": [{{"name": "acme", "key": "...", '
            '"adapters": ["sql"]}]}'
        ) from None
