"""More adapters than the device holds: they come and go, and nobody but the scheduler cares."""

from __future__ import annotations

import pytest

from lora_serve.common.errors import AdapterNotFoundError, CapacityError, InternalError, InvalidArgumentError

from .core_driver import CoreDriver

pytestmark = pytest.mark.usefixtures("async_scheduling")
NUM_BYTES = 1024
"""Of each adapter."""


def make_driver(num_resident=2, **options):
    return CoreDriver(lora_memory_gb=num_resident * NUM_BYTES / 2**30, max_loras=8, **options)


def load_all(driver, *names):
    return [driver.load(name, f"/{name}") for name in names]


def states(driver):
    return {info.name: info.state for info in driver.core.adapters()}


def on_device(driver):
    return {info.name for info in driver.core.adapters() if info.tier == "device"}


def lose(driver, *adapter_ids):
    """Let these be on disk alone, where nobody reads them until `is_read` says so."""
    driver.files.is_read = lambda adapter_id: False
    for adapter_id in adapter_ids:
        driver.files.lose(adapter_id)
    driver.step()


# --- Loads without room -----------------------------------------------------------------------------------


def test_load_beyond_the_devices_memory_serves_at_once_and_is_brought_in_on_demand():
    driver = make_driver()
    results = load_all(driver, "a", "b", "c")
    assert [result.adapter_id for result in results] == [1, 2, 3]
    assert states(driver) == {"a": "resident", "b": "resident", "c": "registered"}
    assert [(i.name, i.tier, i.adapter_slot) for i in driver.info("c")] == [("c", "host", -1)]
    request = driver.add("c")
    driver.run()
    driver.assert_complete(request)
    assert "c" in on_device(driver)
    assert len(on_device(driver)) == 2
    stats = driver.core.stats()
    assert (stats.total_adapter_loads, stats.total_adapter_evictions) == (3, 1)
    assert (stats.num_resident_adapters, stats.num_adapter_bytes) == (2, 2 * NUM_BYTES)
    [info] = driver.info("c")
    assert (info.total_loads, info.total_evictions, info.total_started_requests) == (1, 0, 1)
    assert info.total_queue_us > 0
    assert info.total_scheduled_tokens == 10 + 5


def test_replacement_without_room_serves_at_once_and_the_old_generation_ends():
    driver = make_driver(1)
    driver.load("a", "/v1")
    old = driver.add("a", max_tokens=20)
    driver.step(3)
    result = driver.load("a", "/v2", load_inplace=True)
    assert (result.adapter_id, result.already_loaded) == (2, False)
    new = driver.add("a")
    driver.run()
    driver.assert_complete(old, new)
    driver.assert_nothing_left_of(1)


def test_many_adapters_take_turns_again_and_again_and_every_token_is_right():
    driver = make_driver(2)
    names = [f"a{number}" for number in range(7)]
    load_all(driver, *names)
    requests = []
    for number in range(42):
        requests.append(driver.add(names[number * 3 % 7], prompt=list(range(number % 4, number % 4 + 9))))
        driver.step(number % 3)
    requests.append(driver.add(None))
    driver.run()
    driver.assert_complete(*requests)
    driver.assert_pages_free()
    assert driver.core.stats().total_adapter_loads > 10
    assert all(info.total_loads - info.total_evictions in (0, 1) for info in driver.core.adapters())


@pytest.mark.parametrize("force", [False, True])
def test_unload_of_an_adapter_that_is_off_the_device(force):
    driver = make_driver(1)
    load_all(driver, "a", "b")
    request = driver.add("b")
    driver.run()
    assert on_device(driver) == {"b"}
    assert driver.unload("a", force=force).adapter_ids == [1]
    driver.assert_complete(request)
    driver.assert_nothing_left_of(1)
    assert on_device(driver) == {"b"}


def test_adapter_memory_hears_of_each_request_and_in_every_step_who_is_next():
    driver = make_driver(1)
    load_all(driver, "a", "b", "c", "d")
    lose(driver, 2, 3, 4)
    touched, lines, poll = [], [], driver.files.poll

    def note(line):
        lines.append((list(line.adapters_to_stage()), list(line.waiting_adapters([1, 2, 3, 4]))))
        return poll(line)

    driver.files.poll, driver.files.touch = note, touched.append
    requests = [driver.add(name, max_tokens=4) for name in "cbdb"]
    driver.step()
    assert touched == [3, 2, 4, 2]
    assert lines == [([3], [3, 2, 4])]
    assert driver.core.stats().num_adapters_being_read == 1
    driver.files.is_read = lambda adapter_id: True
    driver.run()
    driver.assert_complete(*requests)
    fronts = [front for front, _ in lines]
    assert [fronts.index([adapter_id]) for adapter_id in (3, 2, 4)] == sorted(
        fronts.index([adapter_id]) for adapter_id in (3, 2, 4)
    )
    assert lines[-1] == ([], [])
    assert driver.core.stats().num_adapters_being_read == 0


# --- Loads that fail later --------------------------------------------------------------------------------


def test_failed_return_to_the_device_fails_its_requests_alone_with_the_reason_and_retires_the_name():
    driver = make_driver(1)
    load_all(driver, "a", "b")
    first = driver.add("b")
    driver.run()
    driver.executor.failing_loads = {1}
    victims, others = [driver.add("a"), driver.add("a", prompt=[1])], [driver.add("b"), driver.add(None)]
    driver.run()
    for victim in victims:
        assert isinstance(driver.errors[victim], InternalError)
        assert "'a' could not be brought to the device: adapter 1 is set up" in str(driver.errors[victim])
    driver.assert_complete(first, *others)
    with pytest.raises(AdapterNotFoundError):
        driver.add("a")
    driver.assert_nothing_left_of(1)
    driver.executor.failing_loads = set()
    assert driver.load("a", "/a").adapter_id == 3
    again = driver.add("a")
    driver.run()
    driver.assert_complete(again)


def test_load_of_new_content_is_not_answered_by_the_return_of_the_old():
    """Both bear the name; only the first load of a generation has callers."""
    driver = make_driver(1)
    load_all(driver, "a", "b")
    driver.add("b", max_tokens=1)
    driver.run()
    driver.files.hold("/v2")
    load = driver.core.load_adapter("a", "/v2", load_inplace=True)
    request = driver.add("a")
    driver.step_until(lambda: request in driver.finish)
    driver.assert_complete(request)
    assert not load.done()
    driver.files.release("/v2")
    driver.wait_for(load)
    assert load.result().adapter_id == 3


# --- Loads and reads --------------------------------------------------------------------------------------


def test_adapters_on_the_host_run_in_the_plan_that_loads_them_and_take_turns():
    driver = make_driver(1)
    load_all(driver, "a", "b")
    driver.run()
    num_steps = driver.core.num_steps
    request = driver.add("b", max_tokens=3)
    driver.run()
    driver.assert_complete(request)
    assert driver.core.num_steps - num_steps == 3
    requests = [driver.add("ab"[n % 2], prompt=list(range(n, n + 9))) for n in range(10)]
    driver.run()
    driver.assert_complete(*requests)
    assert driver.info("a")[0].total_loads > 1


def test_requests_of_others_run_while_an_adapter_is_read_again():
    driver = make_driver(2)
    load_all(driver, "a", "b", "c")
    lose(driver, 3)
    waiting = driver.add("c", max_tokens=3)
    others = [driver.add(name, prompt=list(range(n, n + 5))) for n, name in enumerate(["a", None, "a", None])]
    driver.step_until(lambda: set(others) <= set(driver.finish))
    assert driver.outputs[waiting] == []
    assert driver.info("c")[0].tier == "disk"
    driver.files.is_read = lambda adapter_id: True
    driver.run()
    driver.assert_complete(waiting, *others)


def test_unload_of_an_adapter_whose_load_may_still_run_leaves_nothing():
    driver = make_driver()
    load = driver.core.load_adapter("a", "/a")
    driver.wait_for_reads()
    driver.step()
    unload = driver.core.unload_adapter("a")
    assert load.done()
    driver.wait_for(unload)
    driver.assert_nothing_left_of(1)


def test_running_adapter_is_not_paused_for_one_that_is_still_being_read():
    driver = make_driver(1, adapter_patience_ms=0, adapter_time_slice_steps=1)
    load_all(driver, "a", "b")
    lose(driver, 2)
    runs = driver.add("a", max_tokens=20)
    driver.step(4)
    waits = driver.add("b", max_tokens=3)
    driver.step(10)
    stats = driver.core.stats()
    assert (stats.total_adapter_pauses, stats.num_adapters_in_line) == (0, 1)
    assert on_device(driver) == {"a"}
    assert len(driver.outputs[runs]) > 10
    assert not driver.outputs.get(waits)

    driver.files.is_read = lambda adapter_id: True
    driver.step(4)
    assert driver.core.stats().total_adapter_pauses == 1
    driver.run()
    driver.assert_complete(runs, waits)


def test_paused_adapter_that_is_read_again_holds_nobody_back():
    driver = make_driver(1, adapter_patience_ms=0, adapter_time_slice_steps=1)
    load_all(driver, "a", "b", "c")
    files = driver.files
    paused = driver.add("a", max_tokens=30)
    driver.step(4)
    files.is_read = lambda adapter_id: False  # A disk that hangs.
    between = driver.add("b", max_tokens=4)
    driver.step_until(lambda: driver.core.stats().total_adapter_pauses == 1)
    files.lose(1)
    driver.step_until(lambda: between in driver.finish)
    newcomer = driver.add("c", max_tokens=4)
    driver.step_until(lambda: newcomer in driver.finish)
    assert paused not in driver.finish

    files.is_read = lambda adapter_id: True
    driver.run()
    driver.assert_complete(paused, between, newcomer)


def test_load_that_fails_fails_the_rows_of_its_plan_and_of_the_next_alone():
    driver = make_driver(1)
    load_all(driver, "a", "b")
    driver.add("b", max_tokens=1)
    driver.run()
    driver.executor.failing_loads = {1}
    victims, others = [driver.add("a"), driver.add("a", prompt=[1])], [driver.add(None, max_tokens=20)]
    driver.run()
    for victim in victims:
        assert "'a' could not be brought to the device" in str(driver.errors[victim])
        assert driver.outputs[victim] == []
    driver.assert_complete(*others)
    driver.assert_nothing_left_of(1)
    after = driver.add("b")
    driver.run()
    driver.assert_complete(after)
    driver.assert_pages_free()


# --- Pins and weights -------------------------------------------------------------------------------------


def test_pinned_adapter_is_brought_in_without_a_request_and_never_goes():
    driver = make_driver(2)
    load_all(driver, "a", "b", "c")
    driver.load("p", "/p", pinned=True)
    driver.run()
    assert "p" in on_device(driver)
    for number in range(12):
        request = driver.add("abc"[number % 3])
        driver.run()
        driver.assert_complete(request)
        assert "p" in on_device(driver)
    assert driver.info("p")[0].total_evictions == 0


def test_pinning_more_than_fits_is_refused_with_numbers_and_leaves_nothing():
    driver = make_driver(2)
    driver.load("p", "/p", pinned=True)
    driver.load("q", "/q", pinned=True)
    with pytest.raises(CapacityError, match=r"adapter 'r' is refused: .*1024.*2048"):
        driver.load("r", "/r", pinned=True)
    assert {info.name for info in driver.core.adapters()} == {"p", "q"}
    assert [held.adapter_id for held in driver.files.snapshot()] == [1, 2]
    requests = [driver.add("p"), driver.add("q")]
    driver.run()
    driver.assert_complete(*requests)


def test_adapter_larger_than_the_devices_memory_is_refused_with_numbers():
    driver = CoreDriver(lora_memory_gb=1000 / 2**30)
    with pytest.raises(CapacityError, match=r"adapter 'a' is refused: .*1024.*1000"):
        driver.load("a", "/a")
    assert driver.core.adapters() == []
    assert driver.core.failure is None


def test_load_of_the_same_content_pins_and_unpins_in_the_scheduler():
    driver = make_driver(1)
    load_all(driver, "a")
    assert driver.load("a", "/a", pinned=True).already_loaded
    with pytest.raises(CapacityError):
        driver.load("b", "/b")
    assert driver.load("a", "/a", pinned=False).already_loaded
    driver.load("b", "/b")
    request = driver.add("b")
    driver.run()
    driver.assert_complete(request)
    assert on_device(driver) == {"b"}


def test_refused_pin_of_the_same_content_leaves_it_as_it_was():
    driver = make_driver(1)
    load_all(driver, "a", "b")
    with pytest.raises(CapacityError, match="adapter 'b' is refused"):
        driver.load("b", "/b", pinned=True)
    assert not driver.info("b")[0].pinned
    request = driver.add("b")
    driver.run()
    driver.assert_complete(request)


def test_weight_is_that_of_the_last_load_of_the_content():
    driver = make_driver()
    driver.load("a", "/a", weight=4.0)
    assert driver.info("a")[0].weight == 4.0
    assert driver.load("a", "/a").already_loaded
    assert driver.info("a")[0].weight == 1.0
    for weight in (0, -1, 1001, float("nan"), "2"):
        with pytest.raises(InvalidArgumentError, match="weight"):
            driver.load("a", "/a", weight=weight)
    assert driver.info("a")[0].weight == 1.0


def test_weights_share_the_steps_under_the_fair_policy():
    """One row at a time: of two adapters that always have requests, the heavier one gets more of them."""
    driver = CoreDriver(max_num_seqs=1, max_num_batched_tokens=32)
    driver.load("light", "/light")
    driver.load("heavy", "/heavy", weight=3.0)
    requests = [driver.add(name, max_tokens=8) for _ in range(24) for name in ("light", "heavy")]
    driver.step_until(lambda: len(driver.finish) >= 24)
    finished = [driver.adapter_id_of(request) for request in driver.finish]
    assert 15 <= finished.count(2) <= 20, finished
    driver.run()
    driver.assert_complete(*requests)
