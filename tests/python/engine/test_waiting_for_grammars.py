from __future__ import annotations

from concurrent.futures import Future

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine import wire
from lora_serve.engine.messages import EngineRequest
from lora_serve.engine.waiting_for_grammars import WaitingForGrammars


def message(call_id, *request_ids, timeout_s=None):
    params = SamplingParams(max_tokens=1)
    requests = [
        EngineRequest(request_id=i, prompt_token_ids=[1], sampling_params=params, queue_timeout_s=timeout_s)
        for i in request_ids
    ]
    return wire.AddRequests(call_id, requests)


def test_a_message_waits_for_all_its_grammars_and_others_pass_it():
    waiting, slow, fast = WaitingForGrammars(), Future(), Future()
    first, second, third = message(1, 10), message(2, 20), message(3, 30)
    waiting.add(first, [slow, fast], 1)
    waiting.add(second, [fast], 2)
    waiting.add(third, [fast], 3)
    assert waiting.take_ready() == []
    fast.set_result(None)
    assert [(held.message, held.arrival_us) for held in waiting.take_ready()] == [(second, 2), (third, 3)]
    slow.set_exception(ValueError("wrong"))  # Who adds the requests will raise it.
    assert [held.message for held in waiting.take_ready()] == [first]
    assert waiting.take_ready() == []


def test_a_message_that_nobody_waits_for_is_dropped():
    waiting, grammar = WaitingForGrammars(), Future()
    both, one = message(1, 10, 11), message(2, 20)
    waiting.add(both, [grammar], 0)
    waiting.add(one, [grammar], 0)
    assert waiting.drop([10, 20]) == [one]
    assert waiting.messages == [both]
    grammar.set_result(None)
    assert [held.message for held in waiting.take_ready()] == [both]


def test_a_message_waits_for_as_long_as_it_may_and_only_what_nobody_else_wants_is_cancelled():
    waiting, shared, own = WaitingForGrammars(), Future(), Future()
    patient, hasty = message(1, 10), message(2, 20, timeout_s=0.5)
    assert waiting.next_deadline_us is None
    waiting.add(patient, [shared], 0)
    waiting.add(hasty, [shared, own], 1_000)
    assert waiting.next_deadline_us == 501_000
    assert waiting.take_expired(500_999) == []
    assert waiting.take_expired(501_000) == [hasty]
    assert (shared.cancelled(), own.cancelled()) == (False, True)
    assert waiting.next_deadline_us is None
