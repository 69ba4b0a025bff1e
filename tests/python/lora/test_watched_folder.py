from __future__ import annotations

import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from lora_serve.lora.folder_scan import FileStamp, FolderFiles, scan_folder
from lora_serve.lora.watched_folder import FolderAction, WatchedFolder


def stamp(version: int) -> FileStamp:
    return FileStamp(device=1, inode=2, size=3, mtime_ns=version, ctime_ns=version)


def files(version: int) -> FolderFiles:
    return FolderFiles(stamp(version), stamp(version))


CONFIG_ONLY = FolderFiles(stamp(1), None)


def any_name(name: str) -> str | None:
    return "it has a colon" if ":" in name else None


class Watch:
    """A folder of one subfolder "sql", and an engine that does at once what it is asked for."""

    def __init__(self, name: str = "sql") -> None:
        self.folder = WatchedFolder(any_name)
        self.name = name
        self.serving: dict[str, int] = {}
        self.next_id = 1
        self.notes: list[str] = []

    def poll(self, state: FolderFiles | None, *, times: int = 1) -> list[str]:
        """Kinds of the actions that so many polls ask for; they succeed."""
        kinds = []
        for _ in range(times):
            for action in self.ask({self.name: state}):
                kinds.append(action.kind)
                self.succeed(action)
        return kinds

    def ask(self, scan: dict[str, FolderFiles | None]) -> list[FolderAction]:
        changes = self.folder.update(scan, self.serving)
        self.notes += changes.notes
        return changes.actions

    def succeed(self, action: FolderAction) -> None:
        if action.kind == "unload":
            del self.serving[action.name]
            self.folder.finish(action, None)
        else:
            self.load_by_hand(action.name)
            self.folder.finish(action, self.serving[action.name])

    def load_by_hand(self, name: str = "sql") -> None:
        self.serving[name] = self.next_id
        self.next_id += 1


def test_subfolder_is_loaded_at_the_second_poll_that_sees_the_same_and_only_then():
    watch = Watch()

    assert watch.poll(files(1)) == []
    assert watch.poll(files(1)) == ["load"]
    assert watch.poll(files(1), times=3) == []
    assert watch.notes == []


def test_half_written_folder_is_not_taken_for_as_long_as_it_changes():
    watch = Watch()

    for state in (CONFIG_ONLY, CONFIG_ONLY, files(1), files(2), files(3), files(4)):
        assert watch.poll(state) == []
    assert watch.poll(files(4)) == ["load"]
    assert watch.notes == ["subfolder 'sql' has no adapter_model.safetensors; it is not loaded"]


def test_changed_files_are_reloaded_in_place_once_they_rest():
    watch = Watch()
    watch.poll(files(1), times=2)

    assert watch.poll(files(2)) == []
    assert watch.poll(files(3)) == []
    assert watch.poll(files(3)) == ["reload"]
    assert watch.poll(files(3), times=2) == []


def test_adapter_serves_on_while_one_of_its_files_is_missing():
    watch = Watch()
    watch.poll(files(1), times=2)

    assert watch.poll(CONFIG_ONLY, times=4) == []
    assert watch.notes == ["subfolder 'sql' has no adapter_model.safetensors; what it had loaded is kept"]
    assert watch.poll(files(2), times=2) == ["reload"]


def test_adapter_is_unloaded_when_its_folder_or_both_files_are_gone_in_two_polls():
    watch = Watch()
    watch.poll(files(1), times=2)

    assert watch.ask({}) == []
    [action] = watch.ask({})
    assert action.kind == "unload"
    watch.succeed(action)
    assert watch.poll(files(1), times=2) == ["load"]
    assert watch.poll(FolderFiles(), times=2) == ["unload"]


def test_folder_that_cannot_be_read_for_a_while_changes_nothing():
    watch = Watch()
    watch.poll(files(1), times=2)

    assert watch.poll(None, times=3) == []
    assert watch.poll(files(1), times=3) == []
    assert watch.notes == ["subfolder 'sql' cannot be read; what it had loaded is kept"]


def test_what_fails_to_load_is_tried_again_when_its_files_change_and_not_before():
    watch = Watch()
    watch.poll(files(1))
    [action] = watch.ask({"sql": files(1)})
    watch.folder.finish(action, None)

    assert watch.poll(files(1), times=3) == []
    assert watch.poll(files(2), times=2) == ["load"]


def test_failed_reload_leaves_the_old_generation_the_folders_own():
    watch = Watch()
    watch.poll(files(1), times=2)
    watch.poll(files(2))
    [action] = watch.ask({"sql": files(2)})
    watch.folder.finish(action, None)

    assert watch.poll(files(2), times=3) == []
    assert watch.poll(FolderFiles(), times=2) == ["unload"]


def test_nothing_else_is_asked_for_a_name_until_the_action_has_ended():
    watch = Watch()
    watch.poll(files(1))
    [action] = watch.ask({"sql": files(1)})

    assert watch.ask({"sql": files(2)}) == []
    assert watch.ask({"sql": files(2)}) == []
    watch.succeed(action)
    assert watch.poll(files(2)) == ["reload"]


def test_name_that_no_adapter_can_have_is_noted_once():
    watch = Watch("a:b")

    for version in (1, 1, 1, 2, 2, 3, 3):
        assert watch.poll(files(version)) == []
    assert watch.notes == ["subfolder 'a:b' is not loaded: it has a colon"]


def test_adapter_that_was_loaded_by_hand_is_not_touched():
    watch = Watch()
    watch.load_by_hand()

    assert watch.poll(files(1), times=3) == []
    assert watch.poll(FolderFiles(), times=3) == []
    assert watch.poll(files(2), times=3) == []
    assert len(watch.notes) == 2
    assert "somebody else has loaded" in watch.notes[0]
    watch.serving.clear()
    assert watch.poll(files(2), times=3) == []
    assert watch.poll(files(3), times=2) == ["load"]


@pytest.mark.parametrize("replaced", [True, False])
def test_adapter_that_was_replaced_or_unloaded_by_hand_is_left_alone(replaced):
    watch = Watch()
    watch.poll(files(1), times=2)
    if replaced:
        watch.load_by_hand()
    else:
        watch.serving.clear()

    assert watch.poll(files(1), times=3) == []
    assert watch.notes == ["adapter 'sql' was replaced or unloaded by somebody else; it is left alone"]
    assert watch.poll(files(2), times=2) == ([] if replaced else ["load"])
    assert watch.poll(FolderFiles(), times=2) == ([] if replaced else ["unload"])


def test_folder_is_at_rest_after_two_equal_looks_until_something_changes_or_ends():
    watch = Watch()
    scan = {"sql": files(1)}
    assert not watch.folder.is_at_rest({})
    watch.ask(scan)
    assert not watch.folder.is_at_rest(scan)
    [action] = watch.ask(scan)
    assert watch.folder.is_at_rest(scan)
    watch.succeed(action)
    assert not watch.folder.is_at_rest(scan)
    watch.ask(scan)
    assert watch.folder.is_at_rest(scan)
    assert not watch.folder.is_at_rest({"sql": files(2)})


# --- Random lives -----------------------------------------------------------------------------------------

NAMES = ("a", "b", "x:y")
STATES = [FolderFiles(), CONFIG_ONLY, FolderFiles(None, stamp(1)), *(files(version) for version in (1, 2, 3))]


class FolderLife(RuleBasedStateMachine):
    """Disk, engine and people change at will between polls; actions end late, early or badly."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = WatchedFolder(any_name)
        self.disk: dict[str, FolderFiles | None] = {}
        self.history: dict[str, list[FolderFiles | None]] = {name: [] for name in NAMES}
        self.serving: dict[str, int] = {}
        self.own: dict[str, int] = {}  # What the folder has loaded and nobody has changed since.
        self.next_id = 1
        self.running: dict[str, FolderAction] = {}
        self.ended: list[tuple[FolderAction, int | None]] = []
        self.tried: dict[str, FolderFiles] = {}

    @rule(name=st.sampled_from(NAMES), state=st.sampled_from([*STATES, None]))
    def write(self, name: str, state: FolderFiles | None) -> None:
        self.disk[name] = state

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        self.disk.pop(name, None)

    @rule(name=st.sampled_from(NAMES))
    def load_by_hand(self, name: str) -> None:
        self.own.pop(name, None)
        self.load(name)

    @rule(name=st.sampled_from(NAMES))
    def unload_by_hand(self, name: str) -> None:
        self.own.pop(name, None)
        self.serving.pop(name, None)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), succeeds=st.booleans())
    def end_an_action(self, data: st.DataObject, succeeds: bool) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.running))), succeeds=succeeds)

    @rule(num_polls=st.integers(1, 3))
    def poll(self, num_polls: int) -> None:
        for _ in range(num_polls):
            for action, adapter_id in self.ended:
                self.folder.finish(action, adapter_id)
            self.ended = []
            for name in NAMES:
                self.see(name, self.disk.get(name, FolderFiles()))
            if self.folder.is_at_rest(self.disk):
                continue
            for action in self.folder.update(self.disk, self.serving).actions:
                self.check(action)
                self.running[action.name] = action

    def load(self, name: str) -> int:
        self.serving[name] = self.next_id
        self.next_id += 1
        return self.serving[name]

    def end(self, name: str, *, succeeds: bool) -> None:
        action = self.running.pop(name)
        adapter_id = None
        if action.kind == "unload":
            if name in self.own:
                del self.own[name], self.serving[name]
        elif succeeds and (action.kind == "reload" or name not in self.serving):
            adapter_id = self.own[name] = self.load(name)
        self.ended.append((action, adapter_id))

    def see(self, name: str, state: FolderFiles | None) -> None:
        history = self.history[name]
        history.append(state)
        if state is not None and not state.is_complete and history[-2:] == [state, state]:
            self.tried.pop(name, None)  # What comes back after a while counts as changed.

    def check(self, action: FolderAction) -> None:
        name = action.name
        assert name not in self.running, "an action of this name is under way"
        assert any_name(name) is None
        assert self.history[name][-2:] == [action.files, action.files], "the files have not come to rest"
        if action.kind == "load":
            assert name not in self.serving, "somebody else's adapter"
        else:
            assert self.own[name] == self.serving[name], "somebody else's adapter"
        if action.kind == "unload":
            assert action.files.is_empty
            return
        assert action.files.is_complete
        assert action.files != self.tried.get(name), "the same files are tried again"
        self.tried[name] = action.files

    def settle(self) -> None:
        """Polls after which nothing is left to do, if everything succeeds."""
        for _ in range(4):
            for name in list(self.running):
                self.end(name, succeeds=True)
            self.poll(2)
        assert not self.running

    def teardown(self) -> None:
        """Left to itself, with names that are free, it follows the disk: nothing is stuck or forgotten."""
        self.settle()
        self.serving = dict(self.own)
        self.disk = {name: files(9) for name in NAMES}
        self.settle()
        assert self.tried.get("a") == self.tried.get("b") == files(9)
        assert sorted(self.serving) == sorted(self.own) == ["a", "b"]
        self.disk = {}
        self.settle()
        assert self.serving == {}


TestFolderLife = FolderLife.TestCase
TestFolderLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# --- The scan ---------------------------------------------------------------------------------------------


def write_files(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(name)


def test_scan_sees_subfolders_and_links_to_folders_and_nothing_else(tmp_path):
    both = ("adapter_config.json", "adapter_model.safetensors")
    watched = tmp_path / "watched"
    write_files(watched / "whole", *both)
    write_files(watched / "half", both[0])
    write_files(watched / "empty")
    write_files(watched / ".hidden", *both)
    write_files(tmp_path / "elsewhere", *both)
    (watched / "link").symlink_to(tmp_path / "elsewhere")
    (watched / "broken").symlink_to(tmp_path / "nothing")
    (watched / "file").write_text("")

    scan = scan_folder(str(watched))

    assert sorted(scan) == ["empty", "half", "link", "whole"]
    assert scan["whole"].is_complete
    assert scan["link"].is_complete
    assert scan["empty"].is_empty
    assert scan["half"].weights is None
    assert not scan["half"].is_empty


@pytest.mark.parametrize("change", ["content", "replaced", "old_times", "link"])
def test_every_way_to_change_a_file_shows(change, tmp_path):
    both = ("adapter_config.json", "adapter_model.safetensors")
    write_files(tmp_path / "watched" / "sql", *both)
    write_files(tmp_path / "watched" / "other", *both)
    weights = tmp_path / "watched" / "sql" / both[1]
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    before = scan_folder(str(tmp_path / "watched"))["sql"]

    if change == "content":
        weights.write_text("other and longer than before")
    elif change == "replaced":
        os.replace(tmp_path / "watched" / "other" / both[1], weights)
    elif change == "old_times":
        time_of_the_clock = weights.stat().st_ctime_ns
        while weights.stat().st_ctime_ns == time_of_the_clock:
            weights.write_text(weights.read_text()[::-1])
            os.utime(weights, ns=times)
    else:
        weights.unlink()
        weights.symlink_to(tmp_path / "watched" / "other" / both[1])

    after = scan_folder(str(tmp_path / "watched"))["sql"]
    assert after.config == before.config
    assert after.weights != before.weights


def test_folder_that_is_gone_is_an_error_and_no_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        scan_folder(str(tmp_path / "nothing"))
