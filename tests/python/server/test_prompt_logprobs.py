from __future__ import annotations

import pytest

from server.http_calls import chat, complete, make_app, make_client


def entry(token, logprob, rank):
    return {"logprob": logprob, "rank": rank, "decoded_token": token}


SHOWN = [None, {"101": entry("e", -3.0, 3), "35": entry("#", -1.0, 1)}]


@pytest.mark.parametrize("echo", [False, True])
def test_prompt_logprobs_of_a_completion_are_by_token_id(echo):
    client = make_client()
    answer = complete(make_app(client), prompt="he", prompt_logprobs=1, n=2, echo=echo).json()
    assert [choice["prompt_logprobs"] for choice in answer["choices"]] == [SHOWN] * 2
    assert client.submissions[0].params.prompt_logprobs == 1


def test_echoed_logprobs_and_prompt_logprobs_are_as_many_as_each_asks_for():
    client = make_client()
    answer = complete(make_app(client), prompt="he", prompt_logprobs=1, logprobs=2, echo=True).json()
    assert client.submissions[0].params.prompt_logprobs == 2
    assert answer["choices"][0]["prompt_logprobs"] == SHOWN
    assert list(answer["choices"][0]["logprobs"]["top_logprobs"][1]) == ["#", "$", "e"]


def test_prompt_logprobs_of_a_chat_stand_beside_its_choices():
    answer = chat(make_app(), prompt_logprobs=0).json()
    assert answer["prompt_logprobs"][:2] == [None, {"101": entry("e", -3.0, 3)}]
    assert len(answer["prompt_logprobs"]) == len("hello")


@pytest.mark.parametrize("ask", [complete, chat])
def test_streamed_prompt_logprobs_are_refused(ask):
    answer = ask(make_app(), prompt_logprobs=1, stream=True)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize(("ask", "prefix"), [(complete, "cmpl"), (chat, "chatcmpl")])
def test_a_request_id_is_shown_in_the_answers_id(ask, prefix):
    assert ask(make_app(), request_id="r-1").json()["id"] == f"{prefix}-r-1"
    for bad in ("ü", "a\nb", "x" * 257):
        assert ask(make_app(), request_id=bad).status_code == 400
