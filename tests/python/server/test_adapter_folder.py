from __future__ import annotations

import asyncio
import dataclasses
import logging
import shutil
from collections.abc import Awaitable, Callable

import pytest

from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.engine.engine_client import LoadedAdapter
from lora_serve.engine.messages import LoadAdapterResult
from lora_serve.server.adapter_folder import MAX_LOADS, AdapterFolder
from lora_serve.server.settings import AdapterFolderSettings
from server.fake_engine_client import FakeEngineClient
from support.waiting import until

FILES = ("adapter_config.json", "adapter_model.safetensors")
POLL_SECONDS = 0.01


@dataclasses.dataclass(frozen=True)
class Serving:
    """What the watch reads of an AdapterInfo."""

    name: str
    adapter_id: int
    pinned: bool
    weight: float
    is_serving: bool = True


class FolderEngine(FakeEngineClient):
    """Every load makes a generation; what it is told to refuse, or to keep waiting, it does."""

    num_polls = 0

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.num_generations = self.num_listings = 0
        self.errors: dict[str, BaseException] = {}
        self.listing_errors: list[Exception] = []
        self.gate: asyncio.Event | None = None
        self.paths: dict[str, str] = {}
        self.num_loading = self.most_loading = 0

    @property
    def is_healthy(self):
        self.num_polls += 1  # With this question every poll begins.
        return self._is_healthy

    @is_healthy.setter
    def is_healthy(self, is_healthy):
        self._is_healthy = is_healthy

    async def load_lora_adapter(self, name, path, *, load_inplace=False, pinned=False, weight=1.0):
        self.operations.append(("load", name, path, load_inplace, pinned, weight))
        self.num_loading += 1
        self.most_loading = max(self.most_loading, self.num_loading)
        try:
            if self.gate is not None:
                await self.gate.wait()
            if name in self.errors:
                raise self.errors[name]
        finally:
            self.num_loading -= 1
        self.paths[name] = path
        return self.serve(name, pinned=pinned, weight=weight)

    def serve(self, name, **fields):
        self.num_generations += 1
        self.adapters[name] = Serving(name, self.num_generations, **fields)
        return LoadAdapterResult(
            name=name, adapter_id=self.num_generations, content_digest="", already_loaded=False
        )

    async def list_lora_adapters(self):
        self.num_listings += 1
        if self.listing_errors:
            raise self.listing_errors.pop()
        return list(self.adapters.values())

    @property
    def loaded_adapters(self):
        return [
            LoadedAdapter(name, self.paths[name], one.pinned, one.weight, "", one.adapter_id)
            for name, one in self.adapters.items()
        ]

    def kinds(self, name="sql"):
        """What was asked for a name, a word each."""
        asked = [operation for operation in self.operations if operation[1] == name]
        return ["reload" if kind == "load" and rest[0] else kind for kind, _, _, *rest in asked]


def write(folder, content="1"):
    folder.mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).write_text(content)


def watch(
    path, live: Callable[[FolderEngine], Awaitable[None]], engine: FolderEngine | None = None, **settings
) -> FolderEngine:
    """Watch a folder for as long as `live` runs."""
    engine = FolderEngine() if engine is None else engine
    options = {"served_model_name": "base", "poll_seconds": POLL_SECONDS, **settings}

    async def run() -> None:
        folder = AdapterFolder(engine, AdapterFolderSettings(str(path), **options))
        await folder.look()
        await folder.start()
        try:
            await live(engine)
        finally:
            await folder.close()
            await folder.close()

    asyncio.run(run())
    return engine


async def polls(engine: FolderEngine, number: int) -> None:
    """Until so many polls that had not begun yet are over."""
    before = engine.num_polls
    await until(lambda: engine.num_polls > before + number)


def test_what_lies_in_the_folder_serves_when_start_returns(tmp_path):
    write(tmp_path / "sql")
    write(tmp_path / "chat")

    async def live(engine):
        assert sorted(engine.adapters) == ["chat", "sql"]

    engine = watch(tmp_path, live)

    assert ("load", "sql", str(tmp_path / "sql"), False, False, 1.0) in engine.operations
    assert sorted(engine.adapters) == ["chat", "sql"]


def test_adapters_come_change_and_go_with_their_folders(tmp_path):
    async def live(engine):
        write(tmp_path / "sql")
        await until(lambda: "sql" in engine.adapters)
        write(tmp_path / "sql", "other content")
        await until(lambda: engine.kinds() == ["load", "reload"])
        shutil.rmtree(tmp_path / "sql")
        await until(lambda: "sql" not in engine.adapters)

    assert watch(tmp_path, live).kinds() == ["load", "reload", "unload"]


def test_reload_keeps_pin_and_weight_that_were_set_by_hand(tmp_path):
    write(tmp_path / "sql")

    async def live(engine):
        by_hand = dataclasses.replace(engine.adapters["sql"], pinned=True, weight=3.0)
        engine.adapters["sql"] = by_hand
        write(tmp_path / "sql", "other content")
        await until(lambda: len(engine.operations) == 2)

    engine = watch(tmp_path, live)
    assert engine.operations[1] == ("load", "sql", str(tmp_path / "sql"), True, True, 3.0)


def test_bad_adapter_is_logged_once_and_the_watch_goes_on(tmp_path, caplog):
    write(tmp_path / "sql")
    write(tmp_path / "bad:name")
    engine = FolderEngine()
    engine.errors["sql"] = InvalidArgumentError("adapter 'sql' has DoRA")

    async def live(engine):
        write(tmp_path / "chat")
        await until(lambda: "chat" in engine.adapters)
        await polls(engine, 2)
        write(tmp_path / "sql", "repaired")
        engine.errors.clear()
        await until(lambda: "sql" in engine.adapters)

    with caplog.at_level(logging.WARNING):
        watch(tmp_path, live, engine)

    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert sum("adapter 'sql' has DoRA" in message for message in messages) == 1
    assert sum("'bad:name' is not loaded" in message for message in messages) == 1
    assert engine.kinds("sql") == ["load", "load"]


@pytest.mark.parametrize("error", [RuntimeError("bug"), InternalError("broken"), asyncio.CancelledError()])
def test_no_error_of_the_engine_ends_the_watch(error, tmp_path):
    write(tmp_path / "sql")
    engine = FolderEngine()
    engine.errors["sql"] = error

    async def live(engine):
        engine.listing_errors = [RuntimeError("bug"), InternalError("broken")]
        write(tmp_path / "chat")
        await until(lambda: "chat" in engine.adapters)

    watch(tmp_path, live, engine)


def test_folder_that_goes_away_unloads_nothing_and_is_logged_once(tmp_path, caplog):
    watched = tmp_path / "watched"
    watched.mkdir()
    write(watched / "sql")

    async def live(engine):
        watched.rename(tmp_path / "unmounted")
        await polls(engine, 5)
        assert engine.kinds() == ["load"]
        (tmp_path / "unmounted").rename(watched)
        write(watched / "chat")
        await until(lambda: "chat" in engine.adapters)

    with caplog.at_level(logging.WARNING):
        engine = watch(watched, live)

    assert engine.kinds() == ["load"]
    [record] = caplog.records
    assert "FileNotFoundError" in record.getMessage()


def test_engine_is_not_asked_while_nothing_changes(tmp_path):
    write(tmp_path / "sql")

    async def live(engine):
        await polls(engine, 5)
        before = engine.num_listings
        await polls(engine, 20)
        assert engine.num_listings == before

    watch(tmp_path, live)


def test_engine_that_has_ended_is_not_asked(tmp_path):
    engine = FolderEngine()

    async def live(engine):
        engine.is_healthy = False
        write(tmp_path / "sql")
        await polls(engine, 5)

    assert watch(tmp_path, live, engine).operations == []


def test_slow_load_holds_up_nothing_else_and_few_run_at_once(tmp_path):
    engine = FolderEngine()

    async def live(engine):
        engine.gate = asyncio.Event()
        for i in range(3 * MAX_LOADS):
            write(tmp_path / f"a{i}")
        await until(lambda: engine.num_loading == MAX_LOADS)
        shutil.rmtree(tmp_path / "sql")
        await until(lambda: "unload" in engine.kinds("sql"))
        engine.gate.set()
        await until(lambda: len(engine.adapters) == 3 * MAX_LOADS)

    write(tmp_path / "sql")
    watch(tmp_path, live, engine)
    assert engine.most_loading == MAX_LOADS


def test_after_a_restart_of_the_engine_what_has_not_changed_is_loaded_at_once(tmp_path):
    write(tmp_path / "sql")
    write(tmp_path / "chat")

    async def run():
        engine = FolderEngine()
        folder = AdapterFolder(engine, AdapterFolderSettings(str(tmp_path), "base", poll_seconds=0.05))
        await folder.look()
        await folder.start()
        await folder.forget_engine()
        engine.adapters.clear()
        await folder.forget_engine()  # As after an engine that ended before it had its adapters.
        write(tmp_path / "chat", "other")
        write(tmp_path / "new")
        await folder.start_again()
        assert set(engine.adapters) == {"sql"}
        await until(lambda: set(engine.adapters) == {"sql", "chat", "new"})
        await folder.close()
        assert engine.kinds() == ["load", "load"]

    asyncio.run(run())


def test_after_restarts_of_the_engine_pin_and_weight_are_as_they_were_set_by_hand(tmp_path):
    names = ("sql", "chat", "math", "gone")
    for name in names:
        write(tmp_path / name)

    async def run():
        engine = FolderEngine()
        folder = AdapterFolder(engine, AdapterFolderSettings(str(tmp_path), "base", POLL_SECONDS))
        await folder.look()
        await folder.start()
        for name in names[1:]:
            engine.adapters[name] = dataclasses.replace(engine.adapters[name], pinned=True, weight=3.0)
        await folder.forget_engine()
        engine.adapters.clear()
        engine.errors["math"] = InternalError("the engine has ended")
        shutil.rmtree(tmp_path / "gone")
        await folder.start_again()
        assert set(engine.adapters) == {"sql", "chat"}
        await folder.forget_engine()  # As of an engine that ended before it had 'math'.
        engine.adapters.clear()
        engine.errors.clear()
        write(tmp_path / "chat", "other")
        await folder.start_again()
        write(tmp_path / "gone")
        await until(lambda: set(engine.adapters) == set(names))
        by_hand, as_new = (True, 3.0), (False, 1.0)
        shared = {name: (one.pinned, one.weight) for name, one in engine.adapters.items()}
        assert shared == {"sql": as_new, "chat": by_hand, "math": by_hand, "gone": as_new}
        # That was for the restart: what is unloaded after it is new when it comes again.
        del engine.adapters["chat"]
        num_listings = engine.num_listings
        await until(lambda: engine.num_listings > num_listings)
        write(tmp_path / "chat", "content of its own")
        await until(lambda: "chat" in engine.adapters)
        assert (engine.adapters["chat"].pinned, engine.adapters["chat"].weight) == as_new
        await folder.close()

    asyncio.run(run())


def test_after_a_restart_of_the_engine_what_was_unloaded_by_hand_stays_unloaded(tmp_path):
    write(tmp_path / "sql")
    write(tmp_path / "chat")
    write(tmp_path / "math")

    async def run():
        engine = FolderEngine()
        folder = AdapterFolder(engine, AdapterFolderSettings(str(tmp_path), "base", POLL_SECONDS))
        await folder.look()
        await folder.start()
        del engine.adapters["sql"]
        engine.serve("math", pinned=False, weight=1.0)
        engine.paths["math"] = "/elsewhere/math"
        num_listings = engine.num_listings
        await until(lambda: engine.num_listings > num_listings)
        await folder.forget_engine()
        engine.adapters.clear()
        await folder.start_again()
        assert set(engine.adapters) == {"chat"}
        write(tmp_path / "sql", "other")
        await until(lambda: set(engine.adapters) == {"chat", "sql"})
        await folder.close()

    asyncio.run(run())


def test_load_that_ended_with_the_engine_is_asked_of_the_next_one(tmp_path):
    write(tmp_path / "sql")

    async def run():
        engine = FolderEngine()
        folder = AdapterFolder(engine, AdapterFolderSettings(str(tmp_path), "base", POLL_SECONDS))
        await folder.look()
        engine.errors["sql"] = InternalError("the engine has ended")
        await folder.start()
        await folder.forget_engine()
        engine.errors.clear()
        await folder.start_again()
        assert set(engine.adapters) == {"sql"}
        await folder.close()

    asyncio.run(run())


def test_close_ends_the_loads_that_wait(tmp_path):
    engine = FolderEngine()

    async def live(engine):
        engine.gate = asyncio.Event()
        write(tmp_path / "sql")
        await until(lambda: engine.num_loading == 1)

    watch(tmp_path, live, engine)
    assert engine.num_loading == 0


def test_base_models_name_is_refused(tmp_path, caplog):
    write(tmp_path / "base")

    async def live(engine):
        await polls(engine, 2)

    engine = watch(tmp_path, live)
    assert engine.operations == []
    assert "base model's name" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "nothing"}, "--lora-dir is .*nothing.* must be an existing folder"),
        ({"allowed_roots": ["root"]}, "--lora-dir cannot be used: .*outside the allowed roots"),
        ({"poll_seconds": 0.0}, "--lora-dir-poll-seconds is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_start(change, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("watched", "root"):
        (tmp_path / name).mkdir()
    settings = AdapterFolderSettings("watched", "base")
    assert dataclasses.replace(settings, allowed_roots=["."]).path == "watched"

    with pytest.raises(InvalidArgumentError, match=words):
        dataclasses.replace(settings, **change)
