from __future__ import annotations

import shutil

import pytest

from lora.source_setup import make_hub_cache
from lora_serve.common.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    InternalError,
    InvalidArgumentError,
)
from lora_serve.common.lora_request import LoRARequest
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.llm import LLM
from lora_serve.testing.adapters import make_random_adapter
from support.tiny_checkpoint import make_tiny_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPT = "the quick brown fox jumps over"
OPTIONS = {
    "device": "cpu",
    "page_size": 4,
    "num_device_pages": 96,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llm")
    make_tiny_checkpoint(path / "model")
    for seed, name in enumerate(["a", "b"]):
        make_random_adapter(path / name, path / "model", rank=4, seed=seed, scale=0.5)
    return path


@pytest.fixture(scope="module")
def shared(folder):
    with LLM(str(folder / "model"), **OPTIONS) as llm:
        llm.load_lora_adapter("a", str(folder / "a"))
        llm.load_lora_adapter("b", str(folder / "b"))
        yield llm


@pytest.fixture
def llm(folder):
    with LLM(str(folder / "model"), **OPTIONS) as llm:
        yield llm


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_every_kind_of_prompt_is_the_same_prompt(shared):
    ids = shared.get_tokenizer().encode(PROMPT)
    kinds = [PROMPT, ids, {"prompt": PROMPT}, {"prompt_token_ids": ids}]
    alone = [shared.generate(kind, GREEDY)[0] for kind in kinds]
    together = shared.generate(kinds, GREEDY)
    assert {tuple(answer) for answer in tokens(alone) + tokens(together)} == {tuple(tokens(alone)[0])}
    assert [output.prompt for output in together] == [PROMPT, None, PROMPT, None]
    assert all(output.prompt_token_ids == ids for output in together)
    assert all(output.finished for output in together)


def test_results_come_in_the_order_of_the_prompts(shared):
    prompts = [PROMPT[n:] for n in range(12)]
    params = [SamplingParams(temperature=0, max_tokens=12 - n) for n in range(12)]
    together = shared.generate(prompts, params)
    assert [output.prompt for output in together] == prompts
    assert [len(answer) for answer in tokens(together)] == list(range(12, 0, -1))
    assert tokens(together) == [
        tokens(shared.generate(*pair))[0] for pair in zip(prompts, params, strict=True)
    ]
    assert [output.outputs[0].finish_reason for output in together] == ["length"] * 12


def test_adapter_of_each_prompt_is_its_own(shared):
    choices = [None, "a", LoRARequest("b"), "a", None]
    together = shared.generate([PROMPT] * 5, GREEDY, choices)
    assert [output.lora_name for output in together] == [None, "a", "b", "a", None]
    assert [output.adapter_id for output in together] == [0, 1, 2, 1, 0]
    alone = [tokens(shared.generate(PROMPT, GREEDY, lora_request=name))[0] for name in (None, "a", "b")]
    assert len({tuple(answer) for answer in alone}) == 3
    assert tokens(together) == [alone[0], alone[1], alone[2], alone[1], alone[0]]
    assert tokens(shared.generate([PROMPT] * 2, GREEDY, "a")) == [alone[1]] * 2


def test_prefix_is_reused_within_the_adapter_alone(llm, folder):
    llm.load_lora_adapter("a", str(folder / "a"))
    num_whole_pages = (len(llm.get_tokenizer().encode(PROMPT)) - 1) // 4 * 4
    cached = [llm.generate(PROMPT, GREEDY, name)[0].num_cached_tokens for name in ("a", "a", None, None, "a")]
    assert cached == [0, num_whole_pages, 0, num_whole_pages, num_whole_pages]


def test_answers_of_one_prompt_differ_by_seed_and_repeat(shared):
    params = SamplingParams(n=3, seed=5, temperature=1.5, max_tokens=8)
    first, second = shared.generate([PROMPT, PROMPT], params)
    assert [answer.index for answer in first.outputs] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in first.outputs}) == 3
    assert [a.token_ids for a in first.outputs] == [a.token_ids for a in second.outputs]
    alone = shared.generate(PROMPT, SamplingParams(seed=6, temperature=1.5, max_tokens=8))
    assert tokens(alone)[0] == first.outputs[1].token_ids


def test_stop_string_ends_the_answer(shared):
    whole = shared.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24))[0].outputs[0]
    stop = whole.text[6:8]
    cut = shared.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24, stop=stop))[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert shared.stats().num_running_requests == 0


def test_logprobs_of_answer_and_prompt_are_there(shared):
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1)
    output = shared.generate(PROMPT, params)[0]
    answer = output.outputs[0]
    assert [next(iter(position)) for position in answer.logprobs] == answer.token_ids
    assert all(
        position[token].rank == 1 for position, token in zip(answer.logprobs, answer.token_ids, strict=True)
    )
    assert answer.cumulative_logprob == pytest.approx(
        sum(
            position[token].logprob for position, token in zip(answer.logprobs, answer.token_ids, strict=True)
        )
    )
    assert output.prompt_logprobs[0] is None
    assert [next(iter(position)) for position in output.prompt_logprobs[1:]] == output.prompt_token_ids[1:]


def test_chat_renders_the_template(shared):
    messages = [{"role": "user", "content": "hi"}]
    rendered = shared.get_tokenizer().apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    [output] = shared.chat(messages, GREEDY)
    assert shared.get_tokenizer().decode(output.prompt_token_ids) == rendered
    assert tokens(shared.chat([messages, messages], GREEDY, "a")) == tokens(
        shared.generate([rendered] * 2, GREEDY, "a")
    )


def test_chat_template_that_refuses_is_an_error_of_the_caller(shared):
    messages = [{"role": "user", "content": "hi"}, {"role": "system", "content": "late"}]
    with pytest.raises(InvalidArgumentError, match="the system message must come first"):
        shared.chat(messages, GREEDY)


def test_max_tokens_of_none_fills_the_context(folder):
    with LLM(str(folder / "model"), **OPTIONS, max_model_len=40) as llm:
        output = llm.generate("abcde", SamplingParams(temperature=0, max_tokens=None))[0]
        assert len(output.outputs[0].token_ids) == 40 - len(output.prompt_token_ids)


def test_lora_request_with_a_path_loads_at_its_first_use_and_not_again(llm, folder, monkeypatch):
    request = LoRARequest("a", str(folder / "a"))
    first = llm.generate([PROMPT] * 3, GREEDY, request)
    monkeypatch.setattr(llm, "load_lora_adapter", None)
    again = llm.generate(PROMPT, GREEDY, request)
    assert tokens(first) == tokens(again) * 3
    assert [info.name for info in llm.list_lora_adapters()] == ["a"]


def test_nothing_is_kept_of_adapters_that_were_unloaded(llm, folder):
    for name in ("a", "b", "c"):
        llm.load_lora_adapter(name, str(folder / "a"))
    llm.unload_lora_adapter("a")
    llm._core._operations.before_failed({2: "the folder was changed"})
    llm._core._operations.on_failed({2: "the folder was changed"})
    assert list(llm._last_loads) == ["c"]
    assert [info.name for info in llm.list_lora_adapters() if info.is_serving] == ["c"]


def test_adapter_of_the_hub_is_asked_for_at_its_first_use_and_not_again(folder, tmp_path, monkeypatch):
    snapshot = make_hub_cache(tmp_path / "cache", "org/sql", folder / "a")
    questions = []

    def download(repo_id, *, revision, allow_patterns):
        questions.append((repo_id, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with LLM(str(folder / "model"), lora_allow_hub=True, **OPTIONS) as llm:
        request = LoRARequest("sql", "org/sql@main")
        for _ in range(3):
            llm.generate(PROMPT, GREEDY, request)
        assert questions == [("org/sql", "main")]
        llm.unload_lora_adapter("sql")
        llm.generate(PROMPT, GREEDY, request)
        assert len(questions) == 2


def test_lora_request_with_other_content_is_a_conflict(llm, folder):
    llm.load_lora_adapter("a", str(folder / "a"))
    with pytest.raises(AdapterConflictError):
        llm.generate(PROMPT, GREEDY, LoRARequest("a", str(folder / "b")))


def test_load_inplace_serves_the_new_weights(llm, folder):
    old = llm.load_lora_adapter("x", str(folder / "a"))
    before = tokens(llm.generate(PROMPT, GREEDY, "x"))
    new = llm.load_lora_adapter("x", str(folder / "b"), load_inplace=True)
    assert new.adapter_id > old.adapter_id
    output = llm.generate(PROMPT, GREEDY, "x")
    assert tokens(output) != before
    assert output[0].num_cached_tokens == 0
    llm.load_lora_adapter("b", str(folder / "b"))
    assert tokens(llm.generate(PROMPT, GREEDY, "b")) == tokens(output)


def test_unloaded_adapter_is_not_found_and_its_pages_are_free(llm, folder):
    llm.load_lora_adapter("a", str(folder / "a"))
    llm.generate(PROMPT, GREEDY, "a")
    assert llm.list_lora_adapters()[0].num_tree_pages > 0
    llm.unload_lora_adapter("a")
    assert llm.list_lora_adapters() == []
    assert llm.stats().num_free_pages == 96
    with pytest.raises(AdapterNotFoundError):
        llm.generate(PROMPT, GREEDY, "a")
    with pytest.raises(AdapterNotFoundError):
        llm.unload_lora_adapter("a")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([PROMPT, PROMPT], GREEDY, [None, "nope"]), AdapterNotFoundError),
        (([PROMPT, PROMPT], GREEDY, ["a"]), InvalidArgumentError),
        (([PROMPT, PROMPT], [GREEDY]), InvalidArgumentError),
        (([PROMPT, []], GREEDY), InvalidArgumentError),
        (([PROMPT, [10**6]], GREEDY), InvalidArgumentError),
        (([PROMPT, {"text": PROMPT}], GREEDY), InvalidArgumentError),
        (([PROMPT, 5.0], GREEDY), InvalidArgumentError),
        ((5, GREEDY), InvalidArgumentError),
        ((PROMPT, {"max_tokens": 5}), InvalidArgumentError),
        ((PROMPT, GREEDY, 5), InvalidArgumentError),
        ((PROMPT * 100, GREEDY), InvalidArgumentError),
    ],
)
def test_bad_call_is_refused_and_runs_nothing(shared, arguments, error):
    steps = shared.stats().total_steps
    with pytest.raises(error):
        shared.generate(*arguments)
    assert shared.stats().total_steps == steps
    assert shared.stats().num_waiting_requests == 0
    assert tokens(shared.generate(PROMPT, GREEDY))


def test_text_that_cannot_fit_is_refused_without_being_tokenised(shared, monkeypatch):
    def encode(*_, **__):
        raise AssertionError("the text was tokenised")

    monkeypatch.setattr(shared.get_tokenizer(), "encode", encode)
    text = PROMPT * 10_000
    for call in (
        lambda: shared.generate(text, GREEDY),
        lambda: shared.chat([{"role": "user", "content": text}], GREEDY),
    ):
        with pytest.raises(InvalidArgumentError, match=r"the prompt has 30\d+ characters but max_model_len"):
            call()


def test_lora_request_with_another_path_of_the_same_content_keeps_the_pin(llm, folder, tmp_path):
    shutil.copytree(folder / "a", tmp_path / "copy")
    llm.load_lora_adapter("a", str(folder / "a"), pinned=True)
    llm.generate(PROMPT, GREEDY, LoRARequest("a", str(tmp_path / "copy")))
    assert [info.pinned for info in llm.list_lora_adapters()] == [True]
    assert llm.load_lora_adapter("a", str(folder / "a")).already_loaded
    assert [info.pinned for info in llm.list_lora_adapters()] == [False]


def test_no_prompts_give_no_answers(shared):
    assert shared.generate([], GREEDY) == []


def test_unknown_option_is_refused_by_name(folder):
    with pytest.raises(InvalidArgumentError, match="max_num_seq'"):
        LLM(str(folder / "model"), max_num_seq=8)


def test_broken_engine_raises_and_says_why(llm, monkeypatch):
    def broken(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(llm._core._executor, "collect", broken)
    with pytest.raises(InternalError, match="the device is gone"):
        llm.generate([PROMPT] * 3, GREEDY)
    with pytest.raises(InternalError, match="the device is gone"):
        llm.generate(PROMPT, GREEDY)


def test_interrupted_call_leaves_nothing_running(shared, monkeypatch):
    step = shared._core.step
    num_steps = 0

    def interrupted():
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(shared._core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shared.generate([PROMPT] * 2, SamplingParams(max_tokens=32))
    monkeypatch.undo()
    assert shared.stats().num_running_requests == shared.stats().num_waiting_requests == 0
    assert shared.stats().num_private_pages == 0
    assert tokens(shared.generate(PROMPT, GREEDY))


def test_progress_bar_counts_prompts(shared, capsys):
    shared.generate([PROMPT] * 3, GREEDY, use_tqdm=True)
    assert "3/3" in capsys.readouterr().err
