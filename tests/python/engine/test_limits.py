"""Limits on what waits, priorities, and requests that wait too long."""

from __future__ import annotations

import pytest

from lora_serve.common.errors import CapacityError, InvalidArgumentError, QueueTimeoutError
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.messages import EngineRequest, WireError
from lora_serve.engine.throughput import Throughput

from .core_driver import CoreDriver

pytestmark = pytest.mark.usefixtures("async_scheduling")


def engine_request(request_id, num_tokens=4, lora_name=None):
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=list(range(num_tokens)),
        sampling_params=SamplingParams(max_tokens=4),
        lora_name=lora_name,
    )


def assert_refused(driver, pattern, **fields):
    """The request is refused, with numbers and a time, and nothing of it is left."""
    before = driver.core.stats()
    with pytest.raises(CapacityError, match=pattern) as refused:
        driver.add(**fields)
    assert 1 <= refused.value.retry_after_s <= 60
    after = driver.core.stats()
    assert after.num_queued_requests == before.num_queued_requests
    assert after.num_queued_tokens == before.num_queued_tokens
    assert after.total_rejected_requests == before.total_rejected_requests + 1


# --- Limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "a"])
def test_more_queued_requests_than_allowed_are_refused_until_one_has_started(name):
    driver = CoreDriver(max_queued_requests=3, max_num_seqs=1)
    driver.load("a", "/a")
    requests = [driver.add(name) for _ in range(3)]
    assert_refused(driver, "3", lora_name=name)
    driver.step(2)
    requests.append(driver.add(name))
    assert_refused(driver, "3", lora_name=name)
    driver.run()
    driver.assert_complete(*requests)
    assert driver.core.stats().total_rejected_requests == 2
    requests.append(driver.add(name))
    driver.run()
    driver.assert_complete(*requests)


@pytest.mark.parametrize("name", [None, "a"])
def test_more_queued_tokens_than_allowed_are_refused(name):
    driver = CoreDriver(max_queued_tokens=25, max_num_seqs=1)
    driver.load("a", "/a")
    requests = [driver.add(name), driver.add(name)]
    assert_refused(driver, "25", lora_name=name)
    requests.append(driver.add(name, prompt=[1, 2, 3]))
    driver.run()
    driver.assert_complete(*requests)


@pytest.mark.parametrize(("name", "other"), [(None, "a"), ("a", "b"), ("a", None)])
def test_more_requests_of_one_adapter_than_allowed_are_refused_and_others_are_not(name, other):
    driver = CoreDriver(max_requests_per_adapter=2)
    driver.load("a", "/a")
    driver.load("b", "/b")
    requests = [driver.add(name), driver.add(name)]
    driver.step(3)  # Running ones count, too.
    assert_refused(driver, "2", lora_name=name)
    requests.append(driver.add(other))
    driver.run()
    requests.append(driver.add(name))
    driver.run()
    driver.assert_complete(*requests)


@pytest.mark.parametrize("name", [None, "a"])
def test_answers_of_one_prompt_are_accepted_all_or_none(name):
    driver = CoreDriver(max_queued_requests=4, max_num_seqs=1)
    driver.load("a", "/a")
    waiting = driver.add(name)
    with pytest.raises(CapacityError):
        driver.core.add_requests([engine_request(100 + i, lora_name=name) for i in range(4)])
    stats = driver.core.stats()
    assert (stats.num_queued_requests, stats.num_queued_tokens) == (1, 10)
    driver.core.add_requests([engine_request(200 + i, lora_name=name) for i in range(3)])
    assert driver.core.stats().num_queued_requests == 4
    for request_id in range(200, 203):
        assert driver.core.finish_request(request_id)
    driver.run()
    driver.assert_complete(waiting)
    driver.assert_pages_free()


@pytest.mark.parametrize(
    ("limit", "most", "found"),
    [("max_queued_requests", 1, 2), ("max_queued_tokens", 7, 8), ("max_requests_per_adapter", 1, 2)],
)
def test_request_that_can_never_be_accepted_is_told_so_and_not_to_try_again(limit, most, found):
    driver = CoreDriver(**{limit: most})
    with pytest.raises(CapacityError, match=f"never be accepted.* --{limit.replace('_', '-')} {found}") as e:
        driver.core.add_requests([engine_request(1), engine_request(2)])
    assert e.value.retry_after_s is None
    driver.core.add_requests([engine_request(1)])
    driver.core.finish_request(1)
    driver.run()


def test_without_limits_nothing_is_refused():
    driver = CoreDriver()
    requests = [driver.add(max_tokens=1) for _ in range(300)]
    driver.run()
    driver.assert_complete(*requests)


# --- When to try again ------------------------------------------------------------------------------------


def test_time_to_try_again_is_what_the_queue_takes_at_the_speed_of_recent_steps():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock = Clock()
    throughput = Throughput(clock)
    assert throughput.seconds_for(10**9) == 1
    for _ in range(50):
        clock.now += 0.1
        throughput.add(100)
    assert throughput.seconds_for(0) == 1
    assert throughput.seconds_for(7_300) == 8
    assert throughput.seconds_for(10**9) == 60
    clock.now += 1000  # Nothing to do.
    throughput.resume()
    for _ in range(200):
        clock.now += 0.1
        throughput.add(10)
    assert throughput.seconds_for(1_000) == pytest.approx(10, abs=1)


def test_time_to_try_again_survives_the_wire():
    error = WireError.from_exception(CapacityError("full", 7)).to_exception()
    assert (type(error), str(error), error.retry_after_s) == (CapacityError, "full", 7)
    error = WireError.from_exception(QueueTimeoutError("late")).to_exception()
    assert (type(error), str(error), error.retry_after_s) == (QueueTimeoutError, "late", None)


# --- Deadlines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "a"])
def test_request_that_has_not_begun_by_its_timeout_fails_and_the_others_go_on(name):
    driver = CoreDriver(max_num_seqs=1)
    driver.load("a", "/a")
    running = driver.add(name, max_tokens=30)
    late, patient = driver.add(name, queue_timeout_s=2.5), driver.add(name, queue_timeout_s=60.0)
    driver.step(3)
    driver.seconds += 2.4
    driver.step(2)
    assert late not in driver.errors
    driver.seconds += 0.2
    driver.step(2)
    error = driver.errors[late]
    assert type(error) is QueueTimeoutError
    assert "queue_timeout of 2.5 seconds" in str(error)
    assert 1 <= error.retry_after_s <= 60
    assert not driver.core.abort(late)
    driver.run()
    driver.assert_complete(running, patient)
    assert driver.outputs[late] == []
    assert driver.core.stats().total_expired_requests == 1
    driver.assert_pages_free()


def test_request_that_has_begun_does_not_expire():
    driver = CoreDriver()
    request = driver.add(max_tokens=30, queue_timeout_s=1.0)
    driver.step(2)
    driver.seconds += 100
    driver.run()
    driver.assert_complete(request)


def test_last_request_expires_in_an_engine_that_has_nothing_else_to_do():
    driver = CoreDriver(lora_memory_gb=1024 / 2**30)
    driver.load("a", "/a")
    driver.load("b", "/b")
    driver.files.is_read = lambda adapter_id: False
    driver.files.lose(2)
    driver.step()
    request = driver.add("b", queue_timeout_s=1.0)
    driver.step(3)
    assert driver.core.has_work
    driver.seconds += 2
    driver.step(2)
    assert type(driver.errors[request]) is QueueTimeoutError
    driver.run()
    driver.assert_pages_free()


def test_expired_and_aborted_in_the_same_moment_is_one_end():
    driver = CoreDriver(max_num_seqs=1)
    driver.add(max_tokens=30)
    request = driver.add(queue_timeout_s=1.0)
    driver.step(2)
    driver.seconds += 5
    assert driver.core.abort(request)
    driver.run()
    assert driver.finish[request] == ("abort", None)
    assert request not in driver.errors
    assert driver.core.stats().total_expired_requests == 0


def test_forced_unload_of_an_adapter_with_an_expired_request():
    driver = CoreDriver(max_num_seqs=1)
    driver.load("a", "/a")
    driver.add(max_tokens=40)
    request = driver.add("a", queue_timeout_s=1.0)
    driver.step(2)
    driver.seconds += 5
    driver.step()
    driver.unload("a", force=True)
    assert type(driver.errors[request]) is QueueTimeoutError
    driver.assert_nothing_left_of(1)


# --- Priorities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fair", "fcfs", "lpm"])
@pytest.mark.parametrize("name", [None, "a"])
def test_lower_priority_values_go_first_and_equal_ones_in_the_order_of_arrival(name, policy):
    driver = CoreDriver(max_num_seqs=1, scheduling_policy=policy)
    driver.load("a", "/a")
    running = driver.add(name, max_tokens=10)
    driver.step(2)
    requests = [
        driver.add(name, prompt=[n] * 9, priority=priority) for n, priority in enumerate([5, 0, 5, -3])
    ]
    driver.run()
    order = [request for request in driver.finish if request != running]
    assert order == [requests[i] for i in (3, 1, 0, 2)]
    driver.assert_complete(running, *requests)


def test_waiting_outweighs_a_class_of_priority():
    driver = CoreDriver(max_num_seqs=1, priority_ageing_ms=500)
    driver.add(max_tokens=10)
    driver.step(2)
    old = driver.add(priority=2, prompt=[1] * 9)
    driver.seconds += 2
    new = driver.add(priority=0, prompt=[2] * 9)
    driver.run()
    assert list(driver.finish)[1:] == [old, new]


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_queued_requests", -1), ("max_queued_tokens", 2.0), ("scheduling_policy", "lifo")],
)
def test_bad_limit_is_refused_by_name(field, value):
    with pytest.raises(InvalidArgumentError, match=f"{field} is "):
        CoreDriver(**{field: value})
