"""A real server whose requests stay under way, and whose engine stays away, for as long as a test says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.held_engine import START_VARIABLE, STEPS_VARIABLE
from support.server_process import ServerProcess


class HoldableServer(ServerProcess):
    """As `ServerProcess`. What must happen while a request runs need not be quicker than the request."""

    def __init__(self, *arguments: str | Path) -> None:
        super().__init__(*arguments)
        folder = Path(self._folder.name)
        self._num_limits = 0
        self._steps, self._start = folder / "steps", folder / "start"
        self._environment |= {STEPS_VARIABLE: str(self._steps), START_VARIABLE: str(self._start)}
        self._command[self._command.index("lora_serve.cli.main")] = "support.held_engine"

    @contextmanager
    def steps(self, number: int) -> Iterator[None]:
        """Inside the `with`, the engine makes so many steps and no more; it answers all the same.

        The tokens of all of them but the last are sent at once, where two steps may be outstanding.
        """
        written = self._steps.with_suffix(".new")
        self._num_limits += 1
        written.write_text(f"{number} {self._num_limits}")
        written.rename(self._steps)
        try:
            yield
        finally:
            self._steps.unlink()

    @contextmanager
    def engine_start_held(self) -> Iterator[None]:
        """Inside the `with`, an engine process that starts does not become ready."""
        self._start.touch()
        try:
            yield
        finally:
            self._start.unlink()
