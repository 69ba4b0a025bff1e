"""What clients hear when too much waits: 429 or 503, when to try again, and nothing half done."""

from __future__ import annotations

import pytest

from lora_serve.common.errors import CapacityError, QueueTimeoutError
from lora_serve.common.queueing import Queueing
from server.http_calls import call, chat, complete, events, make_app, make_client

FULL = "request 5 would make 9 queued requests, but max_queued_requests is 8"


class FullClient:
    """Refuses the submissions of these indices."""

    def __new__(cls, refused, error):
        client = make_client()
        submit, count = client.submit, iter(range(1000))

        async def refuse_some(*arguments, **options):
            if next(count) in refused:
                raise error
            return await submit(*arguments, **options)

        client.submit = refuse_some
        return client


@pytest.mark.parametrize("ask", [complete, chat])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{}, {"n": 3}])
def test_full_queue_is_429_with_the_seconds_to_wait_before_any_header_of_a_stream(ask, stream, fields):
    client = FullClient({0}, CapacityError(FULL, 7))
    response = ask(make_app(client), stream=stream, **fields)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "error": {"message": FULL, "type": "rate_limit_error", "param": None, "code": "no_capacity"}
    }


@pytest.mark.parametrize("refused", [0, 1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_one_request_are_accepted_all_or_none(refused, stream):
    client = FullClient({refused}, CapacityError(FULL, 2))
    response = complete(make_app(client), prompt=["a", "b", "c"], stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert len(client.submissions) == 2
    open_streams = {s.stream.request_id for s in client.submissions if not s.stream._queue.empty()}
    assert open_streams <= set(client.aborted)


def test_refusal_that_waiting_does_not_mend_names_no_time():
    client = make_client()
    client.load_error = CapacityError("adapter 'new' is refused: 9 bytes beside 8 pinned ones of 10")
    load = {"lora_name": "new", "lora_path": "/adapters/new"}
    response = call(make_app(client), "POST", "/v1/load_lora_adapter", json=load)
    assert response.status_code == 429
    assert "retry-after" not in response.headers


@pytest.mark.parametrize("ask", [complete, chat])
def test_request_that_waited_too_long_is_503_with_the_seconds_to_wait(ask):
    client = make_client()
    client.num_tokens_before_hold = 1
    client.first_stream_fails_with = QueueTimeoutError("did not begin to run within its queue_timeout", 3)
    response = ask(make_app(client), queue_timeout=0.5)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_timeout")


def test_stream_that_waited_too_long_ends_with_an_event():
    client = make_client()
    client.num_tokens_before_hold = 1
    client.first_stream_fails_with = QueueTimeoutError("did not begin to run within its queue_timeout", 3)
    chunks = events(complete(make_app(client), queue_timeout=0.5, stream=True))
    assert chunks[-1]["error"]["code"] == "queue_timeout"


@pytest.mark.parametrize("ask", [complete, chat])
@pytest.mark.parametrize(
    ("fields", "queueing"),
    [
        ({}, Queueing()),
        ({"priority": None, "queue_timeout": None}, Queueing()),
        ({"priority": -7}, Queueing(-7)),
        ({"priority": 3, "queue_timeout": 2}, Queueing(3, 2.0)),
    ],
)
def test_priority_and_timeout_reach_the_engine(ask, fields, queueing):
    client = make_client()
    assert ask(make_app(client), **fields).status_code == 200
    assert [submission.queueing for submission in client.submissions] == [queueing]


def test_weight_of_a_load_reaches_the_engine():
    client = make_client()
    load = {"lora_name": "new", "lora_path": "/adapters/new", "weight": 2.5}
    assert call(make_app(client), "POST", "/v1/load_lora_adapter", json=load).status_code == 200
    assert client.operations == [("load", "new", "/adapters/new", False, False, 2.5)]
