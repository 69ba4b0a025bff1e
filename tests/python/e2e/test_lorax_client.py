"""The lorax-client package, unchanged, against a real server that asks for a key."""

from __future__ import annotations

import asyncio

import httpx
import lorax
import pytest
from lorax.errors import NotFoundError, ValidationError
from lorax.types import Parameters, Request

from lora_serve.testing.adapters import make_random_adapter
from support.server_process import ServerProcess
from support.tiny_checkpoint import make_tiny_checkpoint

# The package uses a name that pydantic has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:The `dict` method is deprecated")

KEY = "sk-of-the-test"
HEADERS = {"Authorization": f"Bearer {KEY}"}
PROMPT = "Whatever is worth doing at all is worth doing well, and so on."
GREEDY = {"max_new_tokens": 12}
NAMES = (None, "red", "org/blue")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lorax")
    model = make_tiny_checkpoint(folder / "model")
    modules = [
        f"{name}={make_random_adapter(folder / str(seed), model, rank=4, seed=seed)}"
        for seed, name in enumerate(NAMES)
        if name is not None
    ]
    with ServerProcess(
        *(model, "--served-model-name", "tiny", "--api-key", KEY, "--lora-modules", *modules)
    ) as server:
        yield server


@pytest.fixture(scope="module")
def expected(server):
    """What the OpenAI interface answers."""
    texts = {}
    with server.http(headers=HEADERS) as http:
        for name in NAMES:
            body = {"model": name or "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
            answer = http.post("/v1/completions", json=body).raise_for_status().json()
            texts[name] = answer["choices"][0]["text"]
    assert len(set(texts.values())) == len(NAMES)
    return texts


@pytest.fixture
def client(server):
    client = lorax.Client(server.url, headers=HEADERS)
    client._create_session()
    client.session.trust_env = False
    with client.session:
        yield client


def joined(events):
    return "".join(event.token.text for event in events if not event.token.special)


@pytest.mark.parametrize("name", NAMES)
def test_generate_and_stream_give_the_adapters_answer(client, expected, name):
    answer = client.generate(PROMPT, adapter_id=name, **GREEDY)
    assert answer.generated_text == expected[name]
    details = answer.details
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 12, None)
    assert details.prompt_tokens == len(PROMPT)
    assert "".join(token.text for token in details.tokens) == expected[name]
    assert all(token.logprob < 0 for token in details.tokens)
    events = list(client.generate_stream(PROMPT, adapter_id=name, **GREEDY))
    assert [event.token.id for event in events] == [token.id for token in details.tokens]
    assert joined(events) == events[-1].generated_text == expected[name]
    assert [event.generated_text for event in events[:-1]] == [None] * 11
    assert events[-1].details.generated_tokens == 12


def test_async_client_runs_many_adapters_at_once(server, expected):
    names = [*NAMES] * 3

    async def main():
        client = lorax.AsyncClient(server.url, headers=HEADERS)

        async def whole(name):
            return (await client.generate(PROMPT, adapter_id=name, **GREEDY)).generated_text

        async def streamed(name):
            return joined([e async for e in client.generate_stream(PROMPT, adapter_id=name, **GREEDY)])

        return await asyncio.gather(*((whole, streamed)[i % 2](name) for i, name in enumerate(names)))

    assert asyncio.run(main()) == [expected[name] for name in names]


def test_options_of_the_client_do_what_they_say(client, expected):
    text = expected["red"]
    stop = text[3:5]
    options = {"adapter_id": "red", **GREEDY}
    for answer in (
        client.generate(PROMPT, stop_sequences=[stop], **options),
        list(client.generate_stream(PROMPT, stop_sequences=[stop], **options))[-1],
    ):
        assert answer.generated_text == text[: text.index(stop) + len(stop)]
        assert answer.details.finish_reason == "stop_sequence"
    assert client.generate(PROMPT, return_full_text=True, **options).generated_text == PROMPT + text
    assert client.generate("Nonsense. " + PROMPT, truncate=len(PROMPT), **options).generated_text == text
    prefill = client.generate(PROMPT, decoder_input_details=True, **options).details.prefill
    assert "".join(token.text for token in prefill) == PROMPT
    assert prefill[0].logprob is None
    tokens = client.generate(PROMPT, return_k_alternatives=3, **options).details.tokens
    for token in tokens:
        assert len(token.alternative_tokens) == 3
        assert token.alternative_tokens[0].id == token.id  # greedy
    bare = client.generate(PROMPT, details=False, **options)
    assert (bare.generated_text, bare.details) == (text, None)


def test_sampling_tells_a_seed_that_repeats_the_answer(client, expected):
    options = {"adapter_id": "red", "do_sample": True, **GREEDY}
    first = client.generate(PROMPT, **options)
    again = client.generate(PROMPT, seed=first.details.seed, **options)
    assert again.generated_text == first.generated_text != expected["red"]
    best = client.generate(PROMPT, best_of=3, temperature=2.0, adapter_id="red", max_new_tokens=12).details
    means = [
        sum(token.logprob for token in sequence.tokens) / len(sequence.tokens)
        for sequence in (best, *best.best_of_sequences)
    ]
    assert len(means) == 3
    assert means == sorted(means, reverse=True)
    assert len({best.seed, *(sequence.seed for sequence in best.best_of_sequences)}) == 3


def test_errors_are_the_exceptions_of_the_package(client):
    for call in (client.generate, lambda *a, **o: list(client.generate_stream(*a, **o))):
        with pytest.raises(NotFoundError, match="nobody"):
            call(PROMPT, adapter_id="nobody")
        with pytest.raises(ValidationError, match="typical"):
            call(PROMPT, typical_p=0.5)
        with pytest.raises(ValidationError, match="max_new_tokens"):
            call(PROMPT, max_new_tokens=100_000)


def test_every_field_of_the_package_is_known(server):
    """What the package sends for a request without options is accepted, field by field."""
    body = Request(inputs=PROMPT, parameters=Parameters(max_new_tokens=1)).model_dump(by_alias=True)
    assert len(body["parameters"]) >= 20
    with server.http(headers=HEADERS) as http:
        for path, kind in (("/generate", dict), ("/", list)):
            response = http.post(path, json=body)
            assert response.status_code == httpx.codes.OK, response.text
            assert isinstance(response.json(), kind)
