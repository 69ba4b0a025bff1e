"""Steps that are planned while the one before runs: what is known late, and what is dropped for it."""

from __future__ import annotations

import pytest

from lora_serve.common.errors import InternalError

from .core_driver import CoreDriver


class WatchedDriver(CoreDriver):
    """Notes the rows of every plan by request: positions computed."""

    def __init__(self, **options):
        super().__init__(**options)
        self.positions = {}
        submit = self.executor.submit

        def watched_submit(plan, states):
            for request_id, computed, scheduled in zip(
                plan.request_ids.tolist(),
                plan.num_computed_tokens.tolist(),
                plan.num_scheduled_tokens.tolist(),
                strict=True,
            ):
                self.positions.setdefault(request_id, []).extend(range(computed, computed + scheduled))
            submit(plan, states)

        self.executor.submit = watched_submit


@pytest.fixture(params=[None, "a"], ids=["base", "adapter"])
def name(request):
    return request.param


@pytest.fixture
def driver():
    driver = WatchedDriver()
    driver.load("a", "/a")
    return driver


def test_plan_is_made_while_the_one_before_runs(driver, name):
    request = driver.add(name)
    driver.step()
    assert driver.core._loop.num_in_flight == 1
    assert driver.outputs[request] == []
    for num_tokens in range(1, 6):
        driver.step()
        assert driver.core._loop.num_in_flight == 1
        assert len(driver.outputs[request]) == num_tokens
    driver.run()
    driver.assert_complete(request)
    driver.assert_pages_free()


def test_no_row_is_planned_beyond_max_tokens(driver, name):
    requests = [driver.add(name, max_tokens=num_tokens) for num_tokens in (1, 2, 5)]
    driver.run()
    driver.assert_complete(*requests)
    for request, num_tokens in zip(requests, (1, 2, 5), strict=True):
        assert driver.positions[request][-1] == 10 + num_tokens - 2


@pytest.mark.parametrize("position", [0, 1, 3])
def test_stop_token_that_is_known_late_ends_the_request_there_and_the_row_after_it_is_dropped(
    driver, name, position
):
    alone = CoreDriver()
    alone.load("a", "/a")
    stop = alone.expected(alone.add(name))[position]
    request = driver.add(name, stop_token_ids=[stop])
    other = driver.add(None, prompt=[7, 8])
    driver.run()
    end = driver.expected(request).index(stop)
    assert driver.outputs[request] == driver.expected(request)[: end + 1]
    assert driver.finish[request] == ("stop", stop)
    assert driver.positions[request] == list(range(10 + end + 1)), "one row more than its tokens needed"
    driver.assert_complete(other)
    driver.assert_pages_free()


def test_request_aborted_while_a_plan_has_it_gets_nothing_more(driver, name):
    request, other = driver.add(name, max_tokens=20), driver.add(None, prompt=[7, 8], max_tokens=20)
    driver.step(4)
    num_tokens = len(driver.outputs[request])
    assert driver.core.abort(request)
    driver.run()
    assert driver.outputs[request] == driver.expected(request)[:num_tokens]
    assert driver.finish[request] == ("abort", None)
    assert len(driver.positions[request]) > 10 + num_tokens - 1
    driver.assert_complete(other)
    driver.assert_pages_free()


def test_row_that_fails_again_in_the_next_plan_is_one_failure(driver, name):
    bad, good = driver.add(name, max_tokens=20), driver.add(name, prompt=list(range(20, 30)), max_tokens=20)
    driver.step(4)
    driver.executor.failing_request_ids = {bad}
    driver.step()
    driver.executor.failing_request_ids = set()
    driver.run()
    assert "logits are not finite" in str(driver.errors[bad])
    assert isinstance(driver.errors[bad], InternalError)
    assert driver.outputs[bad] == driver.expected(bad)[: len(driver.outputs[bad])]
    driver.assert_complete(good)
    driver.assert_pages_free()
    assert driver.core.failure is None


def test_request_ended_by_its_reader_is_not_told_of_the_row_on_its_way(driver, name):
    request = driver.add(name, max_tokens=20)
    driver.step(4)
    outputs = list(driver.outputs[request])
    assert driver.core.finish_request(request)
    driver.run()
    assert driver.outputs[request] == outputs
    assert request not in driver.finish
    driver.assert_pages_free()


def test_settling_takes_what_is_in_flight_and_makes_no_plan(driver, name):
    request = driver.add(name)
    driver.step(3)
    num_steps, num_tokens = driver.core.num_steps, len(driver.outputs[request])
    driver.core.settle()
    driver.core.settle()
    assert driver.core._loop.num_in_flight == 0
    assert driver.core.num_steps == num_steps
    driver.step()
    assert len(driver.outputs[request]) == num_tokens + 1
    driver.run()
    driver.assert_complete(request)


def test_aborted_request_is_gone_when_the_engine_has_settled(driver, name):
    request = driver.add(name, max_tokens=20)
    driver.step(3)
    driver.core.abort(request)
    assert driver.core.stats().num_running_requests == 1
    driver.core.settle()
    driver.assert_pages_free()


def test_failure_with_two_plans_in_flight_tells_everybody_once_with_the_reason(driver, caplog):
    requests = [driver.add(max_tokens=20), driver.add("a", max_tokens=20)]
    driver.step(3)
    driver.executor.raises = RuntimeError("device is gone")
    driver.step(3)
    for request in requests:
        assert "device is gone" in str(driver.errors[request])
    assert not driver.core.has_work
    assert caplog.text.count("plan_id=") == 2


def test_engine_is_stalled_only_when_a_step_can_do_nothing(driver):
    driver.step()
    assert driver.core.is_stalled
    driver.add(prompt=list(range(40)))  # Three chunks: steps without outputs.
    for _ in range(3):
        driver.step()
        assert not driver.core.is_stalled
    driver.run()
    driver.step()
    assert driver.core.is_stalled


def test_requests_without_a_seed_get_one_in_the_order_of_their_arrival():
    seeds = {}
    for max_num_seqs in (1, 4):
        driver = CoreDriver(max_num_seqs=max_num_seqs)
        requests = [driver.add(temperature=1.0, priority=-number) for number in range(4)]
        greedy = driver.add()
        seeds[max_num_seqs] = [driver.core._requests[request].state.seed for request in requests]
        assert driver.core._requests[greedy].state.seed is None
        driver.run()
    assert len(set(seeds[1])) == 4
    assert seeds[1] == seeds[4]
    mine = CoreDriver()
    assert mine.core._requests[mine.add(temperature=1.0, seed=77)].state.seed == 77


@pytest.mark.parametrize("policy", ["write_through", "off"])
@pytest.mark.parametrize("num_host_pages", [0, 40])
def test_tokens_and_ends_are_the_same_with_and_without_overlap(num_host_pages, policy):
    """Few pages, so preemption; stop tokens; adapters that take turns on the device."""
    ends = {}
    for overlap in (True, False):
        driver = CoreDriver(
            async_scheduling=overlap,
            num_device_pages=18,
            max_num_batched_tokens=32,
            max_loras=2,
            lora_memory_gb=2 * 1024 / 2**30,
            num_host_pages=num_host_pages,
            kv_write_policy=policy,
        )
        for one in "abc":
            driver.load(one, f"/{one}")
        requests = []
        for number in range(24):
            one = [None, "a", "b", "c"][number % 4]
            prompt = list(range(number % 5, number % 5 + 3 * (number % 7) + 1))
            request = driver.add(one, prompt=prompt, max_tokens=5 + 3 * (number % 9))
            stops = driver.expected(request)[4:5] if number % 3 == 0 else []
            driver.core.abort(request)
            requests.append(
                driver.add(one, prompt=prompt, max_tokens=5 + 3 * (number % 9), stop_token_ids=stops)
            )
        driver.run()
        assert driver.core.stats().total_preemptions > 0
        assert driver.core.stats().total_adapter_evictions > 0
        ends[overlap] = [(driver.outputs[request], driver.finish[request]) for request in requests]
        driver.assert_pages_free()
    assert ends[True] == ends[False]
    assert {reason for _, (reason, _) in ends[True]} == {"stop", "length"}
