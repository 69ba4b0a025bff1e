from __future__ import annotations

from concurrent.futures import Future

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine import wire
from lora_serve.engine.messages import EngineRequest
from lora_serve.engine.waiting_for_grammars import HeldCounts, WaitingForGrammars


def message(call_id, *request_ids, timeout_s=None):
    params = SamplingParams(max_tokens=1)
    requests = [
        EngineRequest(request_id=i, prompt_token_ids=[1], sampling_params=params, queue_timeout_s=timeout_s)
        for i in request_ids
    ]
    return wire.AddRequests(call_id, requests)


def test_a_message_waits_for_all_its_grammars_and_others_pass_it():
    waiting, slow, fast = WaitingForGrammars(lambda: None), Future(), Future()
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
    waiting, grammar = WaitingForGrammars(lambda: None), Future()
    both, one = message(1, 10, 11), message(2, 20)
    waiting.add(both, [grammar], 0)
    waiting.add(one, [grammar], 0)
    assert waiting.drop([10, 20]) == [one]
    assert waiting.counts.num_requests == 2
    grammar.set_result(None)
    assert [held.message for held in waiting.take_ready()] == [both]


def test_a_message_waits_for_as_long_as_it_may_and_only_what_nobody_else_wants_is_cancelled():
    waiting, shared, own = WaitingForGrammars(lambda: None), Future(), Future()
    patient, hasty = message(1, 10), message(2, 20, timeout_s=0.5)
    assert waiting.next_deadline_us is None
    waiting.add(patient, [shared], 0)
    waiting.add(hasty, [shared, own], 1_000)
    assert waiting.next_deadline_us == 501_000
    assert waiting.take_expired(500_999) == []
    assert waiting.take_expired(501_000) == [hasty]
    assert (shared.cancelled(), own.cancelled()) == (False, True)
    assert waiting.next_deadline_us is None


class CountedFuture(Future):
    """A grammar that counts how often anybody asks whether it is there."""

    num_looks = 0

    def done(self):
        self.num_looks += 1
        return super().done()


def test_nobody_looks_at_those_who_wait_unless_their_own_grammar_call_or_deadline_is_concerned():
    wake_ups = []
    waiting = WaitingForGrammars(lambda: wake_ups.append(None))
    grammars = [CountedFuture() for _ in range(100)]
    for i, grammar in enumerate(grammars):
        waiting.add(message(i, i, timeout_s=3600.0), [grammar], 0)
    for _ in range(10):
        assert (waiting.take_ready(), waiting.take_expired(1), waiting.drop([1000])) == ([], [], [])
    assert sum(grammar.num_looks for grammar in grammars) == 0
    grammars[7].set_result(None)
    assert len(wake_ups) == 1
    assert [held.message.call_id for held in waiting.take_ready()] == [7]
    assert [dropped.call_id for dropped in waiting.drop([9])] == [9]
    assert grammars[9].cancelled()
    assert {i for i, grammar in enumerate(grammars) if grammar.num_looks} <= {7, 9}


def test_what_is_held_is_counted_and_nothing_is_kept_of_what_is_gone():
    waiting = WaitingForGrammars(lambda: None)
    begun = Future()
    begun.set_running_or_notify_cancel()
    for call_id in range(1000):
        waiting.add(message(call_id, call_id, timeout_s=1e9), [begun, Future()], 0)
        if call_id:
            waiting.drop([call_id])
    assert (waiting.counts.num_requests, waiting.counts.num_tokens) == (1, 1)
    assert waiting.counts.num_requests_by_name == {None: 1}
    assert len(waiting._deadlines) <= 2, "of those that are gone"
    waiting.drop([0])
    waiting.take_ready()
    assert waiting.counts == HeldCounts()
    assert waiting.next_deadline_us is None
