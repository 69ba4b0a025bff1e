"""The engine with a host tier: reports reach the scheduler, counts are shown, failures cost only time."""

from __future__ import annotations

import pytest

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.live_requests import LiveRequest
from lora_serve.engine.messages import EngineRequest
from lora_serve.executor.transfer_orders import LOAD_BACK, WRITE_BACK
from lora_serve.testing.oracle_executor import Outcome

from .core_driver import CoreDriver

pytestmark = pytest.mark.usefixtures("async_scheduling")

PAGE_SIZE = 4
POLICIES = ("write_through", "write_back", "off")


def make_driver(**options):
    return CoreDriver(
        **{"num_device_pages": 16, "num_host_pages": 64, "max_num_batched_tokens": 64, **options}
    )


def add_three(driver, name=None):
    """Requests that do not fit together: 50 tokens each, on 64."""
    return [driver.add(name, prompt=list(range(n, n + 20)), max_tokens=30) for n in (0, 30, 60)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [None, "a"])
def test_preempted_requests_recompute_at_most_a_page(name, policy):
    driver = make_driver(kv_write_policy=policy)
    driver.load("a", "/a")
    requests = add_three(driver, name)
    driver.run()
    stats = driver.core.stats()
    driver.assert_complete(*requests)
    assert stats.total_preemptions > 0
    assert stats.total_recomputed_tokens <= stats.total_preemptions * PAGE_SIZE
    assert stats.num_transfers == 0


@pytest.mark.parametrize("kind", [WRITE_BACK, LOAD_BACK])
@pytest.mark.parametrize("name", [None, "a"])
def test_failed_copies_are_reported_and_cost_only_time(name, kind):
    driver = make_driver()
    driver.load("a", "/a")
    kinds = driver.executor.transfer_kinds
    driver.executor.copy_outcome = lambda i: Outcome.FAILED if kinds[i] == kind else Outcome.DONE
    requests = add_three(driver, name)
    driver.run()
    stats = driver.core.stats()
    driver.assert_complete(*requests)
    assert kind in kinds.values()
    assert stats.total_recomputed_tokens > stats.total_preemptions * PAGE_SIZE
    assert stats.num_transfers == 0
    if kind == WRITE_BACK:
        assert stats.num_free_host_pages == stats.num_host_pages


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.FAILED])
@pytest.mark.parametrize("name", [None, "a"])
def test_copy_that_ends_while_nothing_runs_lets_its_request_go_on(name, outcome):
    driver = make_driver()
    driver.load("a", "/a")
    driver.add(name, prompt=list(range(22)), max_tokens=3)
    driver.run()
    driver.add(prompt=list(range(100, 150)), max_tokens=14)  # Takes the whole device.
    driver.run()
    driver.executor.copy_outcome = lambda transfer_id: Outcome.UNDER_WAY
    request = driver.add(name, prompt=list(range(22)), max_tokens=3)
    driver.step(5)
    assert driver.core.has_work
    assert driver.core.stats().num_transfers == 1
    assert driver.outputs[request] == []

    driver.executor.copy_outcome = lambda transfer_id: outcome
    driver.run()
    driver.assert_complete(request)
    assert driver.cached[request] == (20 if outcome is Outcome.DONE else 0)


def test_tokens_from_the_host_are_cached_tokens():
    driver = make_driver()
    driver.load("a", "/a")
    first = driver.add("a", prompt=list(range(22)), max_tokens=3)
    driver.run()
    driver.add(prompt=list(range(100, 150)), max_tokens=14)  # Takes the whole device.
    driver.run()
    assert driver.info("a")[0].num_tree_pages == 0
    again, base = (driver.add(name, prompt=list(range(22)), max_tokens=3) for name in ("a", None))
    driver.run()
    from_device = driver.add("a", prompt=list(range(22)), max_tokens=3)
    driver.run()
    stats = driver.core.stats()
    driver.assert_complete(first, again, base, from_device)
    assert [driver.cached[request] for request in (again, base, from_device)] == [20, 0, 20]
    assert (stats.total_hit_tokens, stats.total_host_hit_tokens) == (40, 20)
    assert stats.num_host_pages == 64


@pytest.mark.parametrize("name", [None, "a"])
def test_last_work_before_the_engine_was_idle_survives_the_next_request(name):
    """A prefill that is its request's only step: none follows in which its pages could be copied in peace."""
    driver = make_driver()
    driver.load("a", "/a")
    prompts = [list(range(start, start + 50)) for start in (0, 100, 200)]
    for prompt in prompts:
        driver.add(name, prompt=prompt, max_tokens=1)
        driver.run()
    again = [driver.add(name, prompt=prompt, max_tokens=1) for prompt in prompts]
    driver.run()
    driver.assert_complete(*again)
    assert [driver.cached[request] for request in again] == [48, 48, 48]


def test_host_pages_are_shown_for_each_adapter_and_gone_with_it():
    driver = make_driver()
    driver.load("a", "/a")
    driver.add("a", prompt=list(range(22)), max_tokens=3)
    driver.run()
    driver.add("a", prompt=list(range(22)), max_tokens=3)
    driver.run()
    info = driver.info("a")[0]
    assert info.num_host_pages == 6  # Of 25 tokens, the last of which has no KV.
    assert (info.total_hit_tokens, info.total_missed_tokens) == (20, 24)
    assert driver.core.stats().num_free_host_pages == 64 - 6
    driver.unload("a")
    assert driver.core.stats().num_free_host_pages == 64


def test_adapter_that_is_back_and_unloaded_while_a_copy_of_its_pages_is_under_way_is_freed_when_it_ends():
    driver = CoreDriver(num_host_pages=30, lora_memory_gb=1024 / 2**30)
    driver.load("a", "/a")
    driver.load("b", "/b")
    driver.executor.copy_outcome = lambda transfer_id: Outcome.UNDER_WAY
    for name in "ab":  # b takes a's room while a's pages are being written back
        driver.add(name)
        driver.run()
        driver.step(2)
    adapter_id = driver.info("a")[0].adapter_id
    driver.add("a")
    driver.step(3)
    unload = driver.core.unload_adapter("a", force=True)
    driver.step(3)
    assert not unload.done()
    driver.executor.copy_outcome = lambda transfer_id: Outcome.DONE
    driver.wait_for(unload)
    driver.assert_nothing_left_of(adapter_id)


def test_without_a_host_tier_there_is_nothing_of_it():
    driver = make_driver(num_host_pages=0)
    requests = add_three(driver)
    driver.run()
    stats = driver.core.stats()
    driver.assert_complete(*requests)
    assert driver.core.model_info.num_host_pages == 0
    assert (stats.num_host_pages, stats.num_free_host_pages, stats.total_host_hit_tokens) == (0, 0, 0)
    assert stats.total_recomputed_tokens > stats.total_preemptions * PAGE_SIZE


def test_only_tokens_that_had_kv_before_count_as_computed_again():
    request = EngineRequest(
        request_id=1, prompt_token_ids=list(range(20)), sampling_params=SamplingParams(max_tokens=9)
    )
    live = LiveRequest.create(request, 0, (), 100)
    prefill_and_decode = [live.note_scheduled(0, *step) for step in [(0, 16), (16, 4), (20, 1)]]
    after_preemption = [live.note_scheduled(0, *step) for step in [(8, 6), (14, 8), (22, 1)]]
    assert prefill_and_decode == [0, 0, 0]
    assert after_preemption == [6, 7, 0]  # Tokens 8 to 13, then 14 to 20; 21 was sampled and never read.


def test_model_info_gives_the_pages_of_both_tiers():
    info = make_driver().core.model_info
    assert (info.num_device_pages, info.num_host_pages) == (16, 64)
