from __future__ import annotations

import hashlib

import pytest

from lora_serve.common.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    InternalError,
    InvalidArgumentError,
)
from lora_serve.engine.adapter_operations import NUM_READERS
from lora_serve.lora import loader_threads
from lora_serve.lora.adapter_reader import FolderChange

from .core_driver import CoreDriver

pytestmark = pytest.mark.usefixtures("async_scheduling")


@pytest.fixture
def driver():
    return CoreDriver()


def digest_of(content):
    return hashlib.sha256(content.encode()).hexdigest()


def error_of(operation):
    return operation.exception(timeout=0)


# --- Loading ----------------------------------------------------------------------------------------------


def test_load_returns_when_the_adapter_is_resident_and_serves(driver):
    result = driver.load("a", "/a")
    assert (result.name, result.adapter_id, result.already_loaded) == ("a", 1, False)
    [info] = driver.info("a")
    assert (info.state, info.tier, info.is_serving) == ("resident", "device", True)
    assert info.content_digest == result.content_digest
    request = driver.add("a")
    driver.run()
    driver.assert_complete(request)


def test_name_is_not_found_until_the_load_is_complete(driver):
    driver.files.hold("/a")
    load = driver.core.load_adapter("a", "/a")
    for _ in range(3):
        driver.step()
        with pytest.raises(AdapterNotFoundError):
            driver.add("a")
    driver.files.release("/a")
    driver.wait_for_reads()
    with pytest.raises(AdapterNotFoundError):
        driver.add("a")
    driver.wait_for(load)
    request = driver.add("a")
    driver.run()
    driver.assert_complete(request)


def test_steps_go_on_while_an_adapter_is_read(driver):
    driver.files.hold("/slow")
    load = driver.core.load_adapter("slow", "/slow")
    requests = [driver.add(), driver.add()]
    driver.step_until(lambda: not driver.core.has_work)
    driver.assert_complete(*requests)
    assert not load.done()
    other = driver.load("fast", "/fast")
    assert other.adapter_id == 1
    driver.files.release("/slow")
    driver.wait_for(load)
    assert load.result().adapter_id == 2


def test_loads_whose_files_do_not_come_hold_up_no_other_load(driver, monkeypatch):
    monkeypatch.setattr(loader_threads, "SLOW_CALL_S", 0.05)
    paths = [f"/hangs{number}" for number in range(3 * NUM_READERS)]
    for path in paths:
        driver.files.hold(path)
        driver.core.load_adapter(path[1:], path)
    assert driver.load("a", "/a").adapter_id == 1
    assert driver.files.num_reads == len(paths) + 1
    for path in paths:
        driver.files.release(path)


def test_same_content_changes_nothing_and_keeps_the_cache(driver):
    first = driver.load("a", "/a")
    prompt = list(range(12))
    driver.add("a", prompt=prompt)
    driver.run()
    driver.files.contents["/copy"] = "/a"
    for path, inplace in [("/a", False), ("/a", True), ("/copy", False), ("/copy", True)]:
        again = driver.load("a", path, load_inplace=inplace)
        assert again.already_loaded
        assert again.adapter_id == first.adapter_id
    request = driver.add("a", prompt=prompt)
    driver.run()
    assert driver.cached[request] == 8
    assert len(driver.core.adapters()) == 1


def test_other_content_is_a_conflict_that_changes_nothing(driver):
    driver.load("a", "/a")
    with pytest.raises(AdapterConflictError, match=r"'/a'.*'/b'; set load_inplace"):
        driver.load("a", "/b")
    request = driver.add("a")
    assert driver.adapter_id_of(request) == 1
    driver.run()
    driver.assert_complete(request)
    assert [info.adapter_id for info in driver.core.adapters()] == [1]


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 6])
def test_load_inplace_lets_old_requests_end_on_the_old_generation_in_every_phase(num_steps):
    driver = CoreDriver(max_num_seqs=1)
    driver.load("a", "/v1")
    prompt = list(range(30))  # Two chunks of prefill; the second request waits in the queue.
    old = [driver.add("a", prompt=prompt), driver.add("a", prompt=prompt)]
    driver.step(num_steps)
    result = driver.load("a", "/v2", load_inplace=True)
    assert (result.adapter_id, result.already_loaded) == (2, False)
    new = driver.add("a", prompt=prompt)
    assert [driver.adapter_id_of(request) for request in [*old, new]] == [1, 1, 2]
    driver.run()
    driver.assert_complete(*old, new)
    assert driver.cached[new] == 0
    driver.assert_nothing_left_of(1)
    assert [info.adapter_id for info in driver.core.adapters()] == [2]


def test_load_inplace_keeps_the_name_serving_at_every_moment(driver):
    driver.load("a", "/v1")
    load = driver.core.load_adapter("a", "/v2", load_inplace=True)
    seen = []
    while not load.done():
        seen.append(driver.adapter_id_of(driver.add("a", max_tokens=1)))
        driver.step()
    assert set(seen) == {1}
    assert driver.adapter_id_of(driver.add("a")) == 2
    driver.run()


def test_loads_that_ask_the_same_are_one_while_they_wait(driver):
    driver.files.hold("/a")
    loads = [driver.core.load_adapter("a", "/a") for _ in range(4)]
    driver.files.release("/a")
    for load in loads:
        driver.wait_for(load)
    assert {load.result().adapter_id for load in loads} == {1}
    assert [load.result().already_loaded for load in loads] == [False, True, True, True]
    assert driver.files.num_reads == 2


@pytest.mark.parametrize("phase", ["reading", "read", "installing"])
def test_load_after_the_files_changed_serves_the_new_content_in_every_phase_of_the_one_before(driver, phase):
    driver.files.contents["/a"] = "old weights"
    if phase == "reading":
        driver.files.hold("/a")
    first = driver.core.load_adapter("a", "/a", load_inplace=True)
    if phase == "reading":
        driver.files.wait_for_reads(1)
    else:
        driver.wait_for_reads()
    if phase == "installing":
        driver.core._operations.poll()
        assert driver.info("a")[0].state == "loading"
    driver.files.contents["/a"] = "new weights"
    second = driver.core.load_adapter("a", "/a", load_inplace=True)
    if phase == "reading":
        driver.files.release("/a")
    driver.wait_for(first)
    driver.wait_for(second)
    assert second.result().content_digest == digest_of("new weights")
    assert not second.result().already_loaded
    assert first.result().content_digest == digest_of("old weights")
    driver.run()
    assert [info.content_digest for info in driver.core.adapters()] == [digest_of("new weights")]


def test_load_without_load_inplace_after_the_files_changed_is_a_conflict(driver):
    driver.files.contents["/a"] = "old weights"
    first = driver.core.load_adapter("a", "/a")
    driver.wait_for_reads()
    driver.files.contents["/a"] = "new weights"
    second = driver.core.load_adapter("a", "/a")
    driver.run()
    assert first.result().content_digest == digest_of("old weights")
    assert isinstance(error_of(second), AdapterConflictError)


def test_load_of_the_same_content_pins_and_unpins_the_generation_that_serves(driver):
    first = driver.load("a", "/a")
    driver.files.contents["/copy"] = "/a"
    for path, inplace, pinned in [("/a", False, True), ("/copy", False, False), ("/copy", True, True)]:
        again = driver.load("a", path, load_inplace=inplace, pinned=pinned)
        assert (again.already_loaded, again.adapter_id) == (True, first.adapter_id)
        [info] = driver.info("a")
        assert (info.pinned, info.is_serving, info.path) == (pinned, True, "/a")
    request = driver.add("a")
    driver.run()
    driver.assert_complete(request)
    driver.unload("a")
    driver.assert_nothing_left_of(first.adapter_id)


def test_refused_load_leaves_the_pin_as_it_is(driver):
    driver.load("a", "/a", pinned=True)
    with pytest.raises(AdapterConflictError):
        driver.load("a", "/b", pinned=False)
    assert driver.info("a")[0].pinned


def test_loads_of_one_name_that_differ_are_worked_off_in_order(driver):
    driver.files.hold("/v1")
    first = driver.core.load_adapter("a", "/v1")
    conflict = driver.core.load_adapter("a", "/v2")
    replace = driver.core.load_adapter("a", "/v2", load_inplace=True)
    joined = driver.core.load_adapter("a", "/v2", load_inplace=True)
    driver.files.wait_for_reads(1)
    assert driver.files.num_reads == 1
    driver.files.release("/v1")
    for load in (first, conflict, replace, joined):
        driver.wait_for(load) if load is not conflict else driver.run()
    assert first.result().adapter_id == 1
    assert isinstance(error_of(conflict), AdapterConflictError)
    assert replace.result().adapter_id == joined.result().adapter_id == 2
    driver.run()
    assert [info.adapter_id for info in driver.core.adapters()] == [2]
    assert driver.files.num_reads == 3


def test_bad_files_fail_their_callers_alone(driver):
    driver.files.contents["/bad"] = "bad"
    request = driver.add()
    bad = [driver.core.load_adapter("bad", "/bad") for _ in range(2)]
    good = driver.core.load_adapter("good", "/good")
    driver.run()
    for load in bad:
        assert isinstance(error_of(load), InvalidArgumentError)
        assert "make it good" in str(error_of(load))
    assert good.result().name == "good"
    driver.assert_complete(request)
    with pytest.raises(AdapterNotFoundError):
        driver.add("bad")
    driver.files.contents["/bad"] = "good now"
    assert driver.load("bad", "/bad").already_loaded is False


def test_unexpected_exception_of_a_read_fails_its_caller_alone(driver):
    driver.files.contents["/odd"] = MemoryError("no room")
    with pytest.raises(InternalError, match=r"'odd' could not be read from '/odd'.*no room"):
        driver.load("odd", "/odd")
    assert driver.core.failure is None
    assert driver.load("a", "/a").adapter_id >= 1


def test_bad_replacement_leaves_the_old_generation_serving(driver):
    driver.load("a", "/v1")
    driver.files.contents["/v2"] = "bad"
    with pytest.raises(InvalidArgumentError):
        driver.load("a", "/v2", load_inplace=True)
    request = driver.add("a")
    driver.run()
    assert driver.adapter_id_of(request) == 1
    driver.assert_complete(request)


@pytest.mark.parametrize(
    ("name", "path", "field"),
    [
        ("", "/a", "lora_name"),
        (" a", "/a", "lora_name"),
        ("a\n", "/a", "lora_name"),
        ("\ud800", "/a", "lora_name"),
        ("a", "", "lora_path"),
        ("a", "/\0", "lora_path"),
        ("a", "/\ud800", "lora_path"),
    ],
)
def test_name_or_path_that_is_none_is_refused_and_not_read(driver, name, path, field):
    with pytest.raises(InvalidArgumentError, match=field):
        driver.load(name, path)
    assert driver.files.num_reads == 0


def test_failed_install_fails_the_load_and_leaves_nothing(driver):
    driver.load("a", "/v1")
    driver.executor.failing_loads = {2}
    with pytest.raises(InternalError, match="'a' could not be brought to the device"):
        driver.load("a", "/v2", load_inplace=True)
    request = driver.add("a")
    driver.run()
    assert driver.adapter_id_of(request) == 1
    driver.assert_complete(request)
    driver.assert_nothing_left_of(2)
    assert driver.load("a", "/v2", load_inplace=True).adapter_id == 3


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("device memory is full", InternalError),
        (FolderChange("the folder was changed"), AdapterConflictError),
    ],
)
def test_failed_refetch_of_a_serving_generation_fails_its_requests_alone_and_retires_the_name(
    driver, reason, error
):
    driver.load("a", "/a")
    victim, other = driver.add("a"), driver.add(None, prompt=[5, 6])
    driver.core._operations.before_failed({1: reason})
    driver.core._operations.on_failed({1: reason})
    with pytest.raises(AdapterNotFoundError):
        driver.add("a")
    driver.run()
    assert type(driver.errors[victim]) is error
    assert reason in str(driver.errors[victim])
    driver.assert_complete(other)
    driver.assert_nothing_left_of(1)


# --- Unloading --------------------------------------------------------------------------------------------


def test_unload_of_an_idle_adapter_leaves_nothing(driver):
    driver.load("a", "/a")
    driver.add("a", prompt=list(range(12)))
    driver.run()
    assert driver.info("a")[0].num_tree_pages > 0
    result = driver.unload("a")
    assert result.adapter_ids == [1]
    driver.assert_nothing_left_of(1)
    assert driver.core.stats().num_free_pages == driver.core.stats().num_device_pages


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 6])
def test_unload_lets_requests_end_in_every_phase_and_then_returns(num_steps):
    driver = CoreDriver(max_num_seqs=1)
    driver.load("a", "/a")
    prompt = list(range(30))
    running, queued = driver.add("a", prompt=prompt), driver.add("a", prompt=prompt)
    driver.step(num_steps)
    unload = driver.core.unload_adapter("a")
    with pytest.raises(AdapterNotFoundError):
        driver.add("a")
    assert driver.info("a")[0].state == "draining"
    assert not driver.info("a")[0].is_serving
    while not unload.done():
        assert driver.core.adapters()
        driver.step()
    driver.assert_complete(running, queued)
    driver.assert_nothing_left_of(1)


def test_unload_while_a_request_is_preempted_lets_it_end():
    driver = CoreDriver(num_device_pages=16, max_num_batched_tokens=64)
    driver.load("a", "/a")
    requests = [driver.add("a", prompt=list(range(n, n + 20)), max_tokens=30) for n in (0, 40)]
    driver.step_until(lambda: driver.core.stats().num_preempted_requests > 0)
    unload = driver.core.unload_adapter("a")
    driver.wait_for(unload)
    driver.assert_complete(*requests)
    driver.assert_nothing_left_of(1)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 6])
def test_forced_unload_aborts_its_requests_in_every_phase(num_steps):
    driver = CoreDriver(max_num_seqs=2)
    driver.load("a", "/a")
    driver.load("b", "/b")
    mine = [driver.add("a", prompt=list(range(30))) for _ in range(2)]
    others = [driver.add(name, prompt=list(range(40, 50))) for name in (None, "b")]
    driver.step(num_steps)
    already_done = set(driver.finish)
    unload = driver.core.unload_adapter("a", force=True)
    driver.wait_for(unload)
    for request in set(mine) - already_done:
        assert driver.finish[request] == ("abort", None)
        assert driver.outputs[request] == driver.expected(request)[: len(driver.outputs[request])]
    driver.assert_nothing_left_of(1)
    driver.run()
    driver.assert_complete(*others)


def test_forced_unload_aborts_a_preempted_request():
    driver = CoreDriver(num_device_pages=16, max_num_batched_tokens=64)
    driver.load("a", "/a")
    requests = [driver.add("a", prompt=list(range(n, n + 20)), max_tokens=30) for n in (0, 40)]
    driver.step_until(lambda: driver.core.stats().num_preempted_requests > 0)
    driver.unload("a", force=True)
    assert {driver.finish[request] for request in requests} == {("abort", None)}
    driver.assert_nothing_left_of(1)
    assert driver.core.stats().num_free_pages == 16


def test_second_unload_is_not_found_while_the_first_still_drains(driver):
    driver.load("a", "/a")
    driver.add("a")
    first = driver.core.unload_adapter("a")
    second = driver.core.unload_adapter("a")
    assert isinstance(error_of(second), AdapterNotFoundError)
    assert not first.done()
    driver.wait_for(first)
    assert isinstance(error_of(driver.core.unload_adapter("a")), AdapterNotFoundError)
    assert isinstance(error_of(driver.core.unload_adapter("never")), AdapterNotFoundError)


def test_reload_after_unload_starts_from_nothing(driver):
    driver.load("a", "/v1")
    prompt = list(range(12))
    driver.add("a", prompt=prompt)
    driver.run()
    driver.unload("a")
    driver.files.contents["/v1"] = "other weights"
    assert driver.load("a", "/v1").adapter_id == 2
    request = driver.add("a", prompt=prompt)
    driver.run()
    assert driver.cached[request] == 0
    driver.assert_complete(request)


def test_load_during_the_drain_of_the_old_generation_serves_at_once(driver):
    driver.load("a", "/v1")
    old = driver.add("a", max_tokens=40)
    driver.step(2)
    unload = driver.core.unload_adapter("a")
    result = driver.load("a", "/v1")
    assert (result.adapter_id, result.already_loaded) == (2, False)
    assert not unload.done()
    new = driver.add("a")
    assert [info.state for info in driver.info("a")] == ["draining", "resident"]
    driver.wait_for(unload)
    driver.run()
    driver.assert_complete(old, new)
    assert unload.result().adapter_ids == [1]
    assert [info.adapter_id for info in driver.core.adapters()] == [2]


def test_unload_after_load_inplace_waits_for_the_older_generation_too(driver):
    driver.load("a", "/v1")
    old = driver.add("a", max_tokens=40)
    driver.step(2)
    driver.load("a", "/v2", load_inplace=True)
    unload = driver.core.unload_adapter("a")
    driver.step(3)
    assert not unload.done()
    driver.wait_for(unload)
    driver.assert_complete(old)
    assert unload.result().adapter_ids == [1, 2]
    driver.assert_nothing_left_of(1, 2)


def test_forced_unload_after_load_inplace_aborts_requests_of_both_generations(driver):
    driver.load("a", "/v1")
    old = driver.add("a", max_tokens=40)
    driver.step(2)
    driver.load("a", "/v2", load_inplace=True)
    new = driver.add("a", max_tokens=40)
    driver.unload("a", force=True)
    assert driver.finish[old] == driver.finish[new] == ("abort", None)
    driver.assert_nothing_left_of(1, 2)


# --- Unloading while a load is pending --------------------------------------------------------------------


def test_unload_cancels_a_load_that_reads(driver):
    driver.files.hold("/a")
    loads = [driver.core.load_adapter("a", "/a"), driver.core.load_adapter("a", "/b")]
    driver.step()
    driver.files.wait_for_reads(1)
    assert not driver.files.is_cancelled["/a"]()
    unload = driver.core.unload_adapter("a")
    assert unload.result(timeout=0).adapter_ids == []
    assert driver.files.is_cancelled["/a"]()
    for load in loads:
        assert isinstance(error_of(load), AdapterConflictError)
        assert "cancelled by an unload" in str(error_of(load))
    driver.files.release("/a")
    driver.run()
    assert driver.core.adapters() == []
    with pytest.raises(AdapterNotFoundError):
        driver.add("a")


def test_unload_cancels_a_load_that_is_being_installed(driver):
    load = driver.core.load_adapter("a", "/a")
    driver.wait_for_reads()
    driver.core._operations.poll()
    assert driver.info("a")[0].state == "loading"
    unload = driver.core.unload_adapter("a")
    assert isinstance(error_of(load), AdapterConflictError)
    driver.wait_for(unload)
    assert unload.result().adapter_ids == [1]
    driver.assert_nothing_left_of(1)
    with pytest.raises(AdapterNotFoundError):
        driver.add("a")


def test_read_that_ends_after_the_unload_does_not_bring_the_adapter_back(driver):
    driver.files.hold("/a")
    driver.core.load_adapter("a", "/a")
    driver.files.wait_for_reads(1)
    driver.step()
    driver.unload("a")
    driver.files.contents["/a"] = "new weights"
    fresh = driver.core.load_adapter("a", "/a")
    driver.files.release("/a")
    driver.wait_for(fresh)
    [info] = driver.core.adapters()
    assert info.content_digest == fresh.result().content_digest
    assert driver.files.num_reads == 2


def test_unload_during_a_replacement_cancels_it_and_drains_the_serving_generation(driver):
    driver.load("a", "/v1")
    old = driver.add("a", max_tokens=20)
    driver.files.hold("/v2")
    replace = driver.core.load_adapter("a", "/v2", load_inplace=True)
    driver.step(2)
    unload = driver.core.unload_adapter("a")
    assert isinstance(error_of(replace), AdapterConflictError)
    driver.files.release("/v2")
    driver.wait_for(unload)
    driver.run()
    driver.assert_complete(old)
    assert unload.result().adapter_ids == [1]
    driver.assert_nothing_left_of(1, 2)


# --- Many adapters ----------------------------------------------------------------------------------------


def test_more_adapters_than_a_step_holds_all_serve_and_base_is_never_charged():
    driver = CoreDriver(max_loras=2, num_device_pages=128)
    for index in range(6):
        driver.load(f"a{index}", f"/a{index}")
    requests = [driver.add(f"a{n % 6}", prompt=list(range(n, n + 10))) for n in range(12)]
    base = driver.add(None)
    driver.run()
    driver.assert_complete(*requests, base)


def test_a_hundred_reloads_leave_nothing_behind(driver):
    for index in range(100):
        driver.files.contents["/a"] = f"weights {index}"
        assert driver.load("a", "/a", load_inplace=True).adapter_id == index + 1
        driver.add("a", max_tokens=2)
    driver.run()
    driver.unload("a")
    driver.assert_nothing_left_of(*range(1, 101))
    assert driver.core.stats().num_free_pages == driver.core.stats().num_device_pages
