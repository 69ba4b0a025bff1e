"""Adapters that come, go and are replaced while requests use them."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from lora_serve.engine.messages import LoadAdapterResult, UnloadAdapterResult


class AdapterHost(Protocol):
    """What loads and unloads: an engine, or a server."""

    def load_adapter(self, name: str, path: str, *, load_inplace: bool = ...) -> Future[LoadAdapterResult]:
        """Begin to load."""

    def unload_adapter(self, name: str, *, force: bool = ...) -> Future[UnloadAdapterResult]:
        """Begin to unload."""


class AdapterChanges:
    """Loads, unloads and replaces adapters, one change after the other at each name.

    Parameters
    ----------
    host
        The engine, or the server.
    contents
        The two directories of each name.
    interval_s
        Between two changes.
    seed
        Of the choices.
    expect_aborts
        Told a name whose requests are about to be aborted.
    """

    def __init__(
        self,
        host: AdapterHost,
        contents: dict[str, list[Path]],
        *,
        interval_s: float,
        seed: int,
        expect_aborts: Callable[[str], None],
    ) -> None:
        self._host = host
        self._contents = contents
        self._interval_s = interval_s
        self._random = random.Random(seed)
        self._expect_aborts = expect_aborts
        self._next_at = 0.0
        self._pending: dict[str, tuple[str, str, Future[Any]]] = {}  # Of a name: what, directory, the end.
        self._serving: dict[str, str] = {}
        self.counts = dict.fromkeys(("load", "replace", "unload", "unload by force"), 0)
        self.path_of_digest: dict[str, str] = {}
        self.problems: list[str] = []

    @property
    def serving(self) -> list[str]:
        """Names that requests may ask for."""
        return list(self._serving)

    @property
    def num_pending(self) -> int:
        """Changes that have not ended."""
        return len(self._pending)

    def load_all(self) -> None:
        """Begin to load every name."""
        for name in self._contents:
            self._load(name)

    def unload_all(self) -> None:
        """Begin to unload what serves; no change may be pending."""
        for name in list(self._serving):
            self._unload(name, force=False)

    def tick(self, now: float, *, may_change: bool = True) -> None:
        """Take up what has ended; and if it is time, and allowed, begin another change."""
        for name, (what, path, future) in list(self._pending.items()):
            if future.done():
                del self._pending[name]
                self._end(name, what, path, future)
        if may_change and now >= self._next_at:
            self._next_at = now + self._interval_s
            self._change()

    def _change(self) -> None:
        names = [name for name in self._contents if name not in self._pending]
        if not names:
            return
        name = self._random.choice(names)
        if name not in self._serving:
            self._load(name)
            return
        kind = self._random.random()
        if kind < 0.4:
            self._load(name, replaces=True)
        else:
            self._unload(name, force=kind > 0.8)

    def _load(self, name: str, *, replaces: bool = False) -> None:
        others = [str(path) for path in self._contents[name] if str(path) != self._serving.get(name)]
        path = self._random.choice(others)
        future = self._host.load_adapter(name, path, load_inplace=replaces)
        self._pending[name] = ("replace" if replaces else "load", path, future)

    def _unload(self, name: str, *, force: bool) -> None:
        del self._serving[name]
        if force:
            self._expect_aborts(name)
        future = self._host.unload_adapter(name, force=force)
        self._pending[name] = ("unload by force" if force else "unload", "", future)

    def _end(self, name: str, what: str, path: str, future: Future[Any]) -> None:
        self.counts[what] += 1
        error = future.exception()
        if error is not None:
            self.problems.append(f"{what} of {name} failed: {type(error).__name__}: {error}")
            return
        if path:
            self._serving[name] = path
            self.path_of_digest[future.result().content_digest] = path
