"""The only place where adapter names exist: name to newest generation.

Everything else (scheduler, caches, device tables) knows an adapter by its generation's number, which is never
used twice, so that nothing computed or loaded for one content can be found by another of the same name.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace

from lora_serve.common.errors import AdapterNotFoundError, InternalError, InvalidArgumentError

MAX_NAME_LENGTH = 256


@dataclass(frozen=True)
class AdapterGeneration:
    """One load of one content under one name; immutable.

    `pinned` and `weight` alone can change in a generation's life: the registry then holds a new record of the
    same number (see :meth:`AdapterRegistry.set_sharing`), so keep the number rather than the record.

    Parameters
    ----------
    adapter_id
        Unique in the process, from 1, never reused. 0 is the base model.
    name
        The user's name for it.
    path
        Real path of the directory that it was read from.
    content_digest
        Hex digest of its content.
    digest_seed
        64 bits from name and content, never 0; seeds the hash chain of its KV pages. Equal in every process
        that loads this content under this name.
    num_bytes
        Bytes of its weights on the device.
    lora_rank
        Its largest rank.
    pinned
        True: it is never chosen as a victim to make room. As the last load of this content asked.
    weight
        Its share of the steps beside others', above 0. As the last load of this content asked.
    """

    adapter_id: int
    name: str
    path: str
    content_digest: str
    digest_seed: int
    num_bytes: int
    lora_rank: int
    pinned: bool
    weight: float = 1.0


@dataclass(frozen=True)
class AdapterContent:
    """What a generation is made from, as the loader read it; fields as in :class:`AdapterGeneration`."""

    path: str
    content_digest: str
    num_bytes: int
    lora_rank: int


class AdapterRegistry:
    """Names and generations.

    The steps of a generation: ``new_generation`` numbers it while it loads and nobody can find it;
    ``publish`` makes it the one that its name stands for; ``retire``, or the publication of a newer one,
    takes the name away while requests that hold it go on; ``forget`` drops the last trace.

    Owns: the map of names, and every generation that was not forgotten.
    Deliberately does not know: requests, slots, files, what may replace what (the engine decides).
    Invariants: a name stands for at most one generation; numbers only grow.
    Not thread-safe: called from the step loop only.
    """

    def __init__(self) -> None:
        self._next_adapter_id = 1
        self._generations: dict[int, AdapterGeneration] = {}
        self._newest: dict[str, AdapterGeneration] = {}

    def new_generation(
        self, name: str, content: AdapterContent, *, pinned: bool = False, weight: float = 1.0
    ) -> AdapterGeneration:
        """Number a generation; its name does not stand for it yet.

        Parameters
        ----------
        name
            The user's name for it.
        content
            What was read for it.
        pinned
            True: it is never chosen as a victim to make room.
        weight
            Its share of the steps beside others', above 0.

        Raises
        ------
        InvalidArgumentError
            The name cannot be an adapter's name (see :func:`check_adapter_name`).
        """
        check_adapter_name(name)
        generation = AdapterGeneration(
            adapter_id=self._next_adapter_id,
            name=name,
            path=content.path,
            content_digest=content.content_digest,
            digest_seed=digest_seed(name, content.content_digest),
            num_bytes=content.num_bytes,
            lora_rank=content.lora_rank,
            pinned=pinned,
            weight=weight,
        )
        self._next_adapter_id += 1
        self._generations[generation.adapter_id] = generation
        return generation

    def set_sharing(self, adapter_id: int, *, pinned: bool, weight: float) -> AdapterGeneration:
        """Pin or unpin a generation and set its weight; nothing else about it changes.

        Returns
        -------
        AdapterGeneration
            The record that the registry holds from now on.

        Raises
        ------
        AdapterNotFoundError
            The registry does not hold this generation.
        """
        generation = self.get(adapter_id)
        if (generation.pinned, generation.weight) == (pinned, weight):
            return generation
        changed = replace(generation, pinned=pinned, weight=weight)
        self._generations[adapter_id] = changed
        if self._newest.get(generation.name) is generation:
            self._newest[generation.name] = changed
        return changed

    def publish(self, generation: AdapterGeneration) -> AdapterGeneration | None:
        """Let the name stand for this generation from now on.

        Returns
        -------
        AdapterGeneration or None
            The generation that the name stood for until now; it must be drained by the caller.

        Raises
        ------
        InternalError
            The generation is not one of this registry's, was forgotten, or the name stands for a newer one.
        """
        if self._generations.get(generation.adapter_id) is not generation:
            raise InternalError(
                f"generation {generation.adapter_id} of adapter '{generation.name}' is published, but the "
                "registry does not hold it; expected one from new_generation that was not forgotten"
            )
        replaced = self._newest.get(generation.name)
        if replaced is not None and replaced.adapter_id >= generation.adapter_id:
            raise InternalError(
                f"adapter '{generation.name}' stands for generation {replaced.adapter_id}, expected one "
                f"older than {generation.adapter_id}"
            )
        self._newest[generation.name] = generation
        return replaced

    def resolve(self, name: str) -> AdapterGeneration:
        """The generation that new requests for a name use.

        Raises
        ------
        AdapterNotFoundError
            The name stands for nothing: never loaded, still loading, or unloaded.
        """
        generation = self._newest.get(name)
        if generation is None:
            raise AdapterNotFoundError(
                f"adapter '{name:.{MAX_NAME_LENGTH}}' is not loaded; load it with POST /v1/load_lora_adapter "
                "or LLM.load_lora_adapter"
            )
        return generation

    def find(self, name: str) -> AdapterGeneration | None:
        """The generation that a name stands for, or None."""
        return self._newest.get(name)

    def retire(self, name: str) -> AdapterGeneration:
        """Take the name away at once; requests that hold the generation go on.

        Returns
        -------
        AdapterGeneration
            The one that the name stood for; it must be drained by the caller.

        Raises
        ------
        AdapterNotFoundError
            The name stands for nothing.
        """
        generation = self.resolve(name)
        del self._newest[name]
        return generation

    def forget(self, adapter_id: int) -> None:
        """Drop a generation that is drained or failed to load; its name must not stand for it.

        Raises
        ------
        AdapterNotFoundError
            The registry does not hold this generation.
        InternalError
            Its name still stands for it, so that new requests could hold it.
        """
        generation = self.get(adapter_id)
        if self._newest.get(generation.name) is generation:
            raise InternalError(
                f"generation {adapter_id} of adapter '{generation.name}' is forgotten while its name stands "
                "for it; retire the name first"
            )
        del self._generations[adapter_id]

    def get(self, adapter_id: int) -> AdapterGeneration:
        """A generation by number: loading, published or draining.

        Raises
        ------
        AdapterNotFoundError
            No generation of this number exists, or it was forgotten.
        """
        generation = self._generations.get(adapter_id)
        if generation is None:
            raise AdapterNotFoundError(f"adapter generation {adapter_id} does not exist or has been unloaded")
        return generation

    def names(self) -> list[str]:
        """The names that stand for a generation, sorted."""
        return sorted(self._newest)

    def published(self) -> list[AdapterGeneration]:
        """The generations that names stand for, sorted by name."""
        return [self._newest[name] for name in self.names()]

    def generations(self) -> list[AdapterGeneration]:
        """Every generation that was not forgotten, in the order of their numbers."""
        return list(self._generations.values())


def check_adapter_name(name: str) -> None:
    """Raise unless a string can be an adapter's name.

    Raises
    ------
    InvalidArgumentError
        Empty, longer than ``MAX_NAME_LENGTH``, not printable, with space around it, or not valid Unicode.
    """
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable() or name != name.strip():
        raise InvalidArgumentError(
            f"lora_name is {name[:MAX_NAME_LENGTH]!r}, expected 1 to {MAX_NAME_LENGTH} printable characters "
            "without space around them"
        )


def digest_seed(name: str, content_digest: str) -> int:
    """64 bits that stand for a name and a content, 1 to 2**64 - 1.

    Parameters
    ----------
    name
        Any Unicode string without lone surrogates.
    content_digest
        Hex digest of the content.

    Notes
    -----
    Both parts are hashed with their lengths in front: no two different pairs give the same bytes to the hash.
    """
    hashed = hashlib.sha256(b"lora_serve digest seed 1")
    for part in (name.encode(), content_digest.encode()):
        hashed.update(struct.pack("<Q", len(part)) + part)
    return int.from_bytes(hashed.digest()[:8], "little") or 1
