from __future__ import annotations

import pytest

from lora_serve.common.errors import AdapterNotFoundError, InternalError, InvalidArgumentError
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.messages import EngineRequest

from .core_driver import CoreDriver

pytestmark = pytest.mark.usefixtures("async_scheduling")


def test_requests_of_base_and_adapters_in_one_batch_get_the_tokens_of_a_run_alone():
    driver = CoreDriver()
    driver.load("a", "/a")
    driver.load("b", "/b")
    ids = [driver.add(name, prompt=list(range(n, n + 20))) for name in (None, "a", "b") for n in (0, 7)]
    driver.run()
    driver.assert_complete(*ids)
    driver.assert_pages_free()


def test_preempted_requests_get_the_tokens_of_a_run_alone():
    driver = CoreDriver(num_device_pages=16, max_num_batched_tokens=64)
    driver.load("a", "/a")
    ids = [driver.add(name, prompt=list(range(n, n + 20)), max_tokens=30) for n, name in enumerate("aa")]
    ids += [driver.add(None, prompt=list(range(50, 70)), max_tokens=30)]
    driver.run()
    assert driver.core.stats().total_preemptions > 0
    driver.assert_complete(*ids)


def test_stop_token_ends_with_its_id_and_eos_without():
    alone = CoreDriver()
    first, third = (alone.expected(alone.add())[i] for i in (0, 2))
    driver = CoreDriver(eos_token_ids=(first,))
    eos = driver.add()
    stop = driver.add(stop_token_ids=[third], ignore_eos=True)
    driver.run()
    assert driver.finish[eos] == ("stop", None)
    assert driver.outputs[eos] == [first]
    assert driver.finish[stop] == ("stop", third)
    assert driver.outputs[stop] == driver.expected(stop)[:3]
    driver.assert_pages_free()


def test_eos_is_ignored_on_demand_and_before_min_tokens():
    alone = CoreDriver()
    tokens = alone.expected(alone.add())
    driver = CoreDriver(eos_token_ids=(tokens[0], tokens[2]))
    ignoring = driver.add(ignore_eos=True)
    late = driver.add(min_tokens=2)
    too_late = driver.add(min_tokens=3)
    driver.run()
    driver.assert_complete(ignoring, too_late)
    assert driver.outputs[late] == tokens[:3]
    assert driver.finish[late] == ("stop", None)


def test_stop_token_as_the_last_token_is_a_stop():
    alone = CoreDriver()
    last = alone.expected(alone.add())[5]
    driver = CoreDriver()
    request = driver.add(stop_token_ids=[last])
    driver.run()
    assert driver.finish[request] == ("stop", last)


def test_cached_tokens_are_those_of_the_first_admission_in_the_own_namespace():
    driver = CoreDriver()
    driver.load("a", "/a")
    prompt = list(range(12))
    first = driver.add("a", prompt=prompt)
    driver.run()
    second, base = driver.add("a", prompt=prompt), driver.add(None, prompt=prompt)
    driver.run()
    assert [driver.cached[request] for request in (first, second, base)] == [0, 8, 0]


def test_prompt_logprobs_keep_the_prefix_from_being_reused():
    driver = CoreDriver()
    driver.add(prompt=list(range(12)))
    driver.run()
    request = driver.add(prompt=list(range(12)), prompt_logprobs=1, logprobs=1)
    outputs = []
    while driver.core.has_work:
        outputs += driver.core.step()
    assert {output.request_id for output in outputs} == {request}
    assert outputs[0].num_cached_tokens == 0
    assert outputs[0].prompt_logprobs[0] is None
    assert [entry.token_ids[0] for entry in outputs[0].prompt_logprobs[1:]] == list(range(1, 12))
    assert all(output.prompt_logprobs is None for output in outputs[1:])
    assert [output.logprobs[0].token_ids[0] for output in outputs] == driver.expected(request)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
@pytest.mark.parametrize("name", [None, "a"])
def test_abort_in_every_phase_tells_the_reader_and_frees_everything(name, num_steps):
    driver = CoreDriver()
    driver.load("a", "/a")
    request, other = driver.add(name, prompt=list(range(30))), driver.add(name, prompt=list(range(40, 50)))
    driver.step(num_steps)
    assert driver.core.abort(request)
    assert not driver.core.abort(request)
    driver.run()
    assert driver.finish[request] == ("abort", None)
    assert driver.outputs[request] == driver.expected(request)[: len(driver.outputs[request])]
    driver.assert_complete(other)
    driver.assert_pages_free()


def test_finish_by_the_reader_ends_silently_and_late_ones_are_normal():
    driver = CoreDriver()
    request = driver.add()
    driver.step(3)
    assert driver.core.finish_request(request)
    assert not driver.core.finish_request(request)
    assert not driver.core.finish_request(12345)
    driver.run()
    assert request not in driver.finish
    driver.assert_pages_free()


def test_row_error_fails_its_request_alone():
    driver = CoreDriver()
    bad, good = driver.add(prompt=list(range(10))), driver.add(prompt=list(range(20, 30)))
    driver.step(2)
    driver.executor.failing_request_ids = {bad}
    driver.run()
    assert "logits are not finite" in str(driver.errors[bad])
    assert isinstance(driver.errors[bad], InternalError)
    driver.assert_complete(good)
    driver.assert_pages_free()
    assert driver.core.failure is None


def test_exception_in_a_step_stops_the_engine_and_fails_everybody_with_the_reason(caplog):
    driver = CoreDriver()
    driver.load("a", "/a")
    driver.files.hold("/slow")
    requests = [driver.add(), driver.add("a")]
    load = driver.core.load_adapter("slow", "/slow")
    unload = driver.core.unload_adapter("a")
    driver.step()
    driver.executor.raises = RuntimeError("device is gone")
    driver.step()
    driver.files.release("/slow")
    assert "device is gone" in driver.core.failure
    for request in requests:
        assert isinstance(driver.errors[request], InternalError)
        assert "device is gone" in str(driver.errors[request])
    for operation in (load, unload, driver.core.load_adapter("b", "/b"), driver.core.unload_adapter("b")):
        assert isinstance(operation.exception(timeout=0), InternalError)
    with pytest.raises(InternalError, match="device is gone"):
        driver.add()
    assert not driver.core.has_work
    assert "plan_id=" in caplog.text
    driver.core.close()
    assert driver.executor.is_closed


def test_close_fails_what_is_in_flight():
    driver = CoreDriver()
    request = driver.add()
    driver.core.close()
    driver.core.close()
    driver.step()
    assert "closed" in str(driver.errors[request])


def test_unknown_adapter_is_not_found_and_nothing_changes():
    driver = CoreDriver()
    with pytest.raises(AdapterNotFoundError, match="nope"):
        driver.add("nope")
    assert not driver.core.has_work


def test_requests_added_together_are_accepted_all_or_none():
    driver = CoreDriver()
    good = EngineRequest(request_id=100, prompt_token_ids=[1], sampling_params=SamplingParams(max_tokens=4))
    too_long = EngineRequest(
        request_id=101, prompt_token_ids=[1] * 70, sampling_params=SamplingParams(max_tokens=4)
    )
    with pytest.raises(InvalidArgumentError):
        driver.core.add_requests([good, too_long])
    driver.run()
    assert driver.outputs == {}
    driver.assert_pages_free()
    mixed = EngineRequest(
        request_id=102, prompt_token_ids=[1], sampling_params=SamplingParams(max_tokens=4), lora_name="a"
    )
    with pytest.raises(InvalidArgumentError, match="must name one"):
        driver.core.add_requests([good, mixed])
    driver.core.add_request(good)
    with pytest.raises(InvalidArgumentError):
        driver.core.add_request(good)


def test_idle_engine_has_no_work_and_steps_do_nothing():
    driver = CoreDriver()
    assert not driver.core.has_work
    assert driver.core.step() == []
    assert driver.core.num_steps == 0
