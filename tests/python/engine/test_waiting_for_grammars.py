from __future__ import annotations

from concurrent.futures import Future

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine import wire
from lora_serve.engine.messages import EngineRequest
from lora_serve.engine.waiting_for_grammars import WaitingForGrammars


def message(call_id, *request_ids):
    params = SamplingParams(max_tokens=1)
    requests = [
        EngineRequest(request_id=i, prompt_token_ids=[1], sampling_params=params) for i in request_ids
    ]
    return wire.AddRequests(call_id, requests)


def test_a_message_waits_for_all_its_grammars_and_others_pass_it():
    waiting, slow, fast = WaitingForGrammars(), Future(), Future()
    first, second, third = message(1, 10), message(2, 20), message(3, 30)
    waiting.add(first, [slow, fast])
    waiting.add(second, [fast])
    waiting.add(third, [fast])
    assert waiting.take_ready() == []
    fast.set_result(None)
    assert waiting.take_ready() == [second, third]
    slow.set_exception(ValueError("wrong"))  # Who adds the requests will raise it.
    assert waiting.take_ready() == [first]
    assert waiting.take_ready() == []


def test_a_message_that_nobody_waits_for_is_dropped():
    waiting, grammar = WaitingForGrammars(), Future()
    both, one = message(1, 10, 11), message(2, 20)
    waiting.add(both, [grammar])
    waiting.add(one, [grammar])
    waiting.drop([10, 20])
    grammar.set_result(None)
    assert waiting.take_ready() == [both]
