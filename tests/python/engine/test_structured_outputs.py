"""Answers of a given form, through the real executor of a tiny model."""

from __future__ import annotations

import json
import os
import re
import threading
import weakref

import pytest

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.common.structured_outputs import ReasoningTokens, StructuredOutputsParams
from lora_serve.engine import grammar_compiler
from lora_serve.engine.grammar_compiler import MAX_THREADS, GrammarCompiler
from lora_serve.engine.isolation import make_domain
from lora_serve.engine.messages import EngineRequest
from lora_serve.engine.tokenizer import Tokenizer
from lora_serve.llm import LLM
from lora_serve.server.parsing.forced_calls import tag_of_strict_calls
from lora_serve.server.protocol.tools import FunctionDefinition
from support.tiny_checkpoint import make_tiny_checkpoint

from .tokenizers_for_tests import byte_fallback, byte_level_bpe

END = 258  # <|im_end|>
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
PROMPT = "Whatever is worth doing at all"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", eos_token_id=END)


def make_llm(model, **options):
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_device_pages": 64, "max_model_len": 256}
    return LLM(
        str(model),
        device="cpu",
        **{**sizes, "lora_memory_gb": 2**-6, "lora_host_memory_gb": 2**-6, **options},
    )


@pytest.fixture(scope="module", params=[True, False], ids=["overlap", "one step at a time"])
def llm(request, model):
    with make_llm(model, async_scheduling=request.param) as llm:
        yield llm


def params(form, **options):
    fields = {"temperature": 1.0, "max_tokens": 100, **options}
    return SamplingParams(structured_outputs=StructuredOutputsParams(**form), **fields)


def form_of(**fields):
    return StructuredOutputsParams(**fields).form


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"choice": ["yes", 'n"o\\', "ünï\n🙂"]}, '(yes|n"o\\\\|ünï\n🙂)'),
        ({"regex": r"\d{3}-[a-f]{2,4}"}, r"\d{3}-[a-f]{2,4}"),
        ({"grammar": 'root ::= "a" tail\ntail ::= "b" | "c"'}, "ab|ac"),
        (
            {"json": SCHEMA, "disable_any_whitespace": True},
            r'\{"name": "(\\u?[^"]|[^"])*", "age": -?\d+\}',
        ),
    ],
    ids=["choice", "regex", "grammar", "json"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_have_the_form_and_end_with_it(llm, form, pattern, temperature):
    [output] = llm.generate([PROMPT], params(form, n=4, seed=3, temperature=temperature))
    for answer in output.outputs:
        if answer.finish_reason == "length":  # A number may be as long as it likes.
            assert "json" in form
            continue
        assert answer.finish_reason == "stop"
        assert answer.stop_reason is None
        assert re.fullmatch(pattern, answer.text), answer.text
        assert answer.token_ids[-1] == END


def test_a_json_object_is_valid_json(llm):
    [output] = llm.generate([PROMPT], params({"json_object": True}, n=8, seed=5, max_tokens=150))
    ended = [answer for answer in output.outputs if answer.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(answer.text), dict) for answer in ended)


def test_other_rows_of_the_step_are_not_masked(llm):
    free = SamplingParams(temperature=1.0, max_tokens=20, seed=1)
    [alone] = llm.generate([PROMPT], free)
    outputs = llm.generate(
        [PROMPT] * 3, [params({"regex": "[01]{20}"}, seed=2), free, params({"regex": "x"})]
    )
    assert outputs[1].outputs[0].token_ids == alone.outputs[0].token_ids
    assert re.fullmatch("[01]{20}", outputs[0].outputs[0].text)
    assert outputs[2].outputs[0].text == "x"


def test_a_seeded_answer_does_not_depend_on_its_company_or_on_overlap(model):
    asked = params({"regex": "[a-z ]{40}"}, seed=11, temperature=1.3, top_p=0.9)
    texts = set()
    for overlap in (True, False):
        with make_llm(model, async_scheduling=overlap) as llm:
            texts.add(llm.generate([PROMPT], asked)[0].outputs[0].text)
            others = [params({"regex": "[0-9]{30}"}, seed=i) for i in range(4)]
            texts.add(llm.generate([PROMPT] * 5, [*others, asked])[4].outputs[0].text)
    assert len(texts) == 1
    assert re.fullmatch("[a-z ]{40}", texts.pop())


def test_preempted_answers_keep_their_form(model):
    """More than the KV pages hold: answers are preempted and go on where they were."""
    asked = params({"regex": "[a-z]{60}"}, seed=4)
    with make_llm(model) as roomy, make_llm(model, num_device_pages=20) as tight:
        expected = roomy.generate([PROMPT + str(i) for i in range(6)], asked)
        found = tight.generate([PROMPT + str(i) for i in range(6)], asked)
        assert tight.stats().total_recomputed_tokens > 0
    assert [o.outputs[0].text for o in found] == [o.outputs[0].text for o in expected]
    assert all(re.fullmatch("[a-z]{60}", o.outputs[0].text) for o in found)


def test_log_probabilities_are_the_models_own(llm):
    asked = params({"regex": "[01]{3}"}, seed=1, logprobs=3)
    [output] = llm.generate([PROMPT], asked)
    [answer] = output.outputs
    assert len(answer.logprobs) == len(answer.token_ids) == 4
    for token_id, position in zip(answer.token_ids, answer.logprobs, strict=True):
        best = sorted(position.values(), key=lambda entry: entry.rank)
        assert best[0].rank == 1
        assert position[token_id].logprob <= best[0].logprob
    assert any(position[t].rank > 3 for t, position in zip(answer.token_ids, answer.logprobs, strict=True))


def test_stop_strings_penalties_and_bias_work_within_the_form(llm):
    stopped = params({"regex": "(ab){20}"}, seed=1, stop="ba")
    assert llm.generate([PROMPT], stopped)[0].outputs[0].text == "a"
    byte_of_b = llm.get_tokenizer().encode("b")[0]
    biased = params({"regex": "[abc]{20}"}, temperature=0.0, logit_bias={byte_of_b: 100.0})
    assert llm.generate([PROMPT], biased)[0].outputs[0].text == "b" * 20
    penalised = params({"regex": "[ab]{20}"}, temperature=0.0, frequency_penalty=2.0, repetition_penalty=9.0)
    assert set(llm.generate([PROMPT], penalised)[0].outputs[0].text) == {"a", "b"}


def test_allowed_tokens_are_the_only_ones(llm):
    allowed = llm.get_tokenizer().encode("xyz")
    asked = SamplingParams(temperature=1.0, seed=1, max_tokens=30, allowed_token_ids=allowed)
    [output] = llm.generate([PROMPT], asked)
    assert {"x", "y"} <= set(output.outputs[0].text) <= set("xyz")


def test_allowed_tokens_that_leave_none_are_refused(llm):
    only_the_end = SamplingParams(allowed_token_ids=[END], min_tokens=2, max_tokens=5)
    with pytest.raises(InvalidArgumentError, match="only tokens that end the answer"):
        llm.generate([PROMPT], only_the_end)
    with pytest.raises(InvalidArgumentError, match="allowed_token_ids has the token id 1000"):
        llm.generate([PROMPT], SamplingParams(allowed_token_ids=[1000]))


@pytest.mark.parametrize("is_open", [False, True])
def test_the_form_begins_after_the_reasoning(llm, is_open):
    """The bytes '<' and '>' stand for the words around it."""
    start, end = llm.get_tokenizer().encode("<")[0], llm.get_tokenizer().encode(">")[0]
    reasoning = ReasoningTokens(start_token_id=start, end_token_id=end, is_open=is_open)
    bias = {start: 12.0, end: 12.0}
    asked = params({"regex": "[01]{4}", "reasoning": reasoning}, seed=2, logit_bias=bias)
    text = llm.generate([PROMPT], asked)[0].outputs[0].text
    assert re.fullmatch(r"[^>]*>[01]{4}" if is_open else r"<[^>]*>[01]{4}", text, re.DOTALL), text


def test_an_answer_may_leave_its_reasoning_out(llm):
    start, end = llm.get_tokenizer().encode("<")[0], llm.get_tokenizer().encode(">")[0]
    reasoning = ReasoningTokens(start_token_id=start, end_token_id=end)
    asked = params({"regex": "[01]{4}", "reasoning": reasoning}, logit_bias={start: -100.0})
    assert re.fullmatch("[01]{4}", llm.generate([PROMPT], asked)[0].outputs[0].text)


def test_special_tokens_stand_for_no_part_of_the_form(llm):
    im_start = 257
    asked = params({"regex": "[^a]{5}"}, temperature=0.0, logit_bias={im_start: 100.0})
    assert im_start not in llm.generate([PROMPT], asked)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"regex": "a("}, "structured_outputs.regex cannot be compiled: Regex parsing error"),
        ({"grammar": "root ::= x"}, 'Rule "x" is not defined'),
        ({"json": {"$ref": "#/$defs/a"}}, "structured_outputs.json cannot be compiled"),
        ({"json": {"$ref": "#"}}, "allows no answer at all"),
        ({"json": "[" * 100_000}, "not valid JSON"),
        ({"regex": "a" * 2049}, "regex has 2049 characters but may have at most 2048"),
    ],
)
def test_a_form_that_cannot_be_compiled_is_refused_every_time(llm, form, text):
    for _ in range(2):
        with pytest.raises(InvalidArgumentError) as caught:
            llm.generate([PROMPT], params(form))
        assert text in str(caught.value)
        assert "/project/" not in str(caught.value)


def test_a_model_that_cannot_end_a_form_is_refused(tmp_path):
    compiler = GrammarCompiler(str(make_tiny_checkpoint(tmp_path / "m")), 259, ())
    with pytest.raises(InvalidArgumentError, match="no end-of-sequence token"):
        compiler.matcher(form_of(regex="a"))


@pytest.mark.parametrize("make_tokenizer", [byte_level_bpe, byte_fallback])
def test_tokens_of_every_kind_of_vocabulary_spell_the_form(make_tokenizer, monkeypatch):
    """Words with their space in front, bytes for characters that the vocabulary lacks.

    An answer goes on from its prompt, so a space in front of its first word would be shown: it is no part.
    """
    tokenizer = make_tokenizer()
    text = "ünï hello 🙂\n"
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.decode_token(token_ids[0]) in ("", " "):
        del token_ids[0]
    vocab_size = len(tokenizer.backend)
    monkeypatch.setattr(Tokenizer, "from_pretrained", lambda model: tokenizer)
    compiler = GrammarCompiler("any", vocab_size + 7, (vocab_size,))
    for form in ({"choice": ["other", text]}, {"regex": "[a-zü]+[^a]*"}):
        matcher = compiler.matcher(form_of(**form))
        for token_id in token_ids:
            mask = matcher.next_mask()
            assert mask[token_id // 32] >> (token_id % 32) & 1, (token_id, form)
            matcher.accept(token_id)
        mask = matcher.next_mask()
        assert mask[vocab_size // 32] >> (vocab_size % 32) & 1
    compiler.close()


FREE_TAG = tag_of_strict_calls(
    [
        FunctionDefinition(
            name="f", strict=True, parameters={"type": "object", "properties": {"a": {"type": "integer"}}}
        ),
        FunctionDefinition(name="ü"),
    ],
    is_parallel=True,
)


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ("free text, even <tool_ and {", True),
        ('a <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call> b', True),
        ('<tool_call>\n{"name": "ü", "arguments": {"any": [1]}}\n</tool_call>', True),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>', False),
        ('<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', False),
    ],
)
def test_calls_of_strict_functions_keep_to_their_schemas_in_free_text(model, text, is_allowed):
    compiler = GrammarCompiler(str(model), 259, (END,))
    matcher = compiler.matcher(form_of(structural_tag=FREE_TAG))
    found = True
    for token_id in [*Tokenizer.from_pretrained(str(model)).encode(text), END]:
        found = found and bool(matcher.next_mask()[token_id // 32] >> (token_id % 32) & 1)
        if not found:
            break
        matcher.accept(token_id)
    assert found == is_allowed
    compiler.close()


def test_a_grammar_is_compiled_once(model, monkeypatch):
    compiled = []
    real = grammar_compiler._compile
    monkeypatch.setattr(
        grammar_compiler, "_compile", lambda backend, source: compiled.append(source) or real(backend, source)
    )
    compiler = GrammarCompiler(str(model), 259, (END,))
    forms = [form_of(regex="a"), form_of(regex="a"), form_of(json=SCHEMA), form_of(regex="a")]
    matchers = [compiler.matcher(form) for form in forms]
    assert len(set(map(id, matchers))) == 4
    assert [source.kind for source in compiled] == ["regex", "json"]
    compiler.close()


def test_a_grammar_whose_masks_would_hold_up_the_steps_is_refused(model, monkeypatch):
    compiler = GrammarCompiler(str(model), 259, (END,))
    assert compiler.matcher(form_of(regex="ab?")) is not None
    monkeypatch.setattr(grammar_compiler, "MAX_MASK_S", -1.0)

    with pytest.raises(InvalidArgumentError, match="ms to say which token may come first"):
        compiler.matcher(form_of(regex="abc?"))
    compiler.close()


def test_a_wrong_grammar_is_compiled_once_and_refused_to_all_who_asked(model, monkeypatch):
    compiled = []
    real = grammar_compiler._compile
    monkeypatch.setattr(
        grammar_compiler, "_compile", lambda backend, source: compiled.append(source) or real(backend, source)
    )
    compiler = GrammarCompiler(str(model), 259, (END,))
    [future] = compiler.prepare([form_of(regex="a(")])
    assert future.exception(30) is not None
    for _ in range(3):
        assert compiler.prepare([form_of(regex="a("), form_of(regex="a(")]) == []
        with pytest.raises(InvalidArgumentError, match="not closed"):
            compiler.matcher(form_of(regex="a("))
    assert len(compiled) == 1
    compiler.close()


def test_the_least_recently_used_grammars_are_forgotten(model, monkeypatch):
    compiled = []
    real = grammar_compiler._compile
    monkeypatch.setattr(
        grammar_compiler, "_compile", lambda backend, source: compiled.append(source) or real(backend, source)
    )
    monkeypatch.setattr(grammar_compiler, "CACHE_BYTES", 1)
    compiler = GrammarCompiler(str(model), 259, (END,))
    for regex in ("a", "b", "b", "a"):
        compiler.matcher(form_of(regex=regex))
    assert [source.text for source in compiled] == ["a", "b", "a"]
    compiler.close()


def test_preparing_does_not_wait_for_the_compiler(model, monkeypatch):
    may_go = threading.Event()
    real = grammar_compiler._compile

    def wait(backend, source):
        assert may_go.wait(60)
        return real(backend, source)

    monkeypatch.setattr(grammar_compiler, "_compile", wait)
    compiler = GrammarCompiler(str(model), 259, (END,))
    [first] = compiler.prepare([form_of(regex="a")])
    assert compiler.prepare([form_of(regex="a")]) == [first]
    assert not first.done()
    may_go.set()
    first.result(60)
    assert compiler.prepare([form_of(regex="a")]) == []
    compiler.close()


class SlowForms:
    """Forms whose text begins with 'slow' are compiled when they may; `begun` has all texts in order.

    Compilers made from now on see a machine of so many cores.
    """

    def __init__(self, monkeypatch, num_cores=64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
        self.begun = []
        self.changed = threading.Condition()
        self.may_end = threading.Event()
        self.real = grammar_compiler._compile
        monkeypatch.setattr(grammar_compiler, "_compile", self.compile)

    def compile(self, backend, source):
        with self.changed:
            self.begun.append(source.text)
            self.changed.notify_all()
        if source.text.startswith("slow"):
            assert self.may_end.wait(60)
        return self.real(backend, source)

    def wait_until_begun(self, num_forms):
        with self.changed:
            return self.changed.wait_for(lambda: len(self.begun) >= num_forms, 60)


def test_slow_forms_of_one_owner_keep_only_that_one_waiting(model, monkeypatch):
    forms = SlowForms(monkeypatch)
    compiler = GrammarCompiler(str(model), 259, (END,))
    slow = [compiler.prepare([form_of(regex=f"slow{i}")], "a") for i in range(2 * MAX_THREADS)]
    [quick_of_a] = compiler.prepare([form_of(regex="quick1")], "a")
    for owner, text in (("b", "quick2"), (None, "quick3"), ("c", "quick1")):
        for future in compiler.prepare([form_of(regex=text)], owner):
            future.result(60)
    assert quick_of_a.done(), "what others want too is compiled in their turn"
    assert forms.wait_until_begun(4)
    assert sorted(forms.begun) == ["quick1", "quick2", "quick3", "slow0"]
    forms.may_end.set()
    for [future] in slow:
        future.result(60)
    assert len(forms.begun) == 2 * MAX_THREADS + 3, "each was compiled once"
    compiler.close()


@pytest.mark.parametrize(("num_cores", "num_at_once"), [(1, 2), (2, 2), (4, 2), (5, 3), (6, 4), (64, 4)])
def test_two_cores_are_left_to_the_steps_unless_one_form_would_hold_up_all(
    model, monkeypatch, num_cores, num_at_once
):
    forms = SlowForms(monkeypatch, num_cores)
    compiler = GrammarCompiler(str(model), 259, (END,))
    futures = [compiler.prepare([form_of(regex=f"slow{owner}")], owner)[0] for owner in range(6)]
    assert forms.wait_until_begun(num_at_once)
    assert len(compiler._threads._threads) == num_at_once
    assert len(forms.begun) == num_at_once
    forms.may_end.set()
    for future in futures:
        future.result(60)
    compiler.close()


def test_a_form_that_nobody_waits_for_any_more_is_not_compiled_unless_it_is_wanted_again(model, monkeypatch):
    forms = SlowForms(monkeypatch)
    compiler = GrammarCompiler(str(model), 259, (END,))
    [slow] = compiler.prepare([form_of(regex="slow")])
    for text in ("gone", "back"):
        [future] = compiler.prepare([form_of(regex=text)])
        assert future.cancel()
    [again] = compiler.prepare([form_of(regex="back")])
    forms.may_end.set()
    again.result(60)
    assert slow.done()
    assert forms.begun == ["slow", "back"]
    compiler.close()


def test_forms_that_nobody_waits_for_any_more_are_forgotten_before_their_owners_turn(model, monkeypatch):
    forms = SlowForms(monkeypatch)
    compiler = GrammarCompiler(str(model), 259, (END,))
    [slow] = compiler.prepare([form_of(regex="slow")], "a")
    gone = []
    for i in range(100):
        for owner in ("a", "b") if i % 2 else ("a",):
            [future] = compiler.prepare([form_of(regex=f"slow{i}")], owner)
            gone.append(weakref.ref(future))
        future.cancel()
    del future
    [wanted] = compiler.prepare([form_of(regex="wanted")], "a")
    kept = {id(ref()) for ref in gone if ref() is not None}
    assert len(kept) <= MAX_THREADS, "those that have begun"
    forms.may_end.set()
    assert wanted.result(60) is not None
    assert slow.done()
    compiler.close()


def test_a_group_is_the_owner_of_its_forms_whatever_their_salt_and_adapter(model, monkeypatch):
    owners = []
    with make_llm(model) as llm:
        monkeypatch.setattr(llm._core._grammars, "prepare", lambda forms, owner: owners.append(owner) or [])
        for group, salt, name in (("g", None, "a"), ("g", "s", "b"), (None, "s", "a"), (None, None, "a")):
            domain = make_domain(group, salt)
            request = EngineRequest(
                request_id=1,
                prompt_token_ids=[1],
                sampling_params=SamplingParams(),
                lora_name=name,
                isolation_domain=domain,
            )
            llm._core.prepare_grammars([request])
    assert owners[0] == owners[1]
    assert owners[2:] == ["a", "a"]
    assert owners[0] != "a"


def test_the_engine_itself_takes_only_a_checked_form(llm):
    request = EngineRequest(request_id=10**9, prompt_token_ids=[1], sampling_params=params({"regex": "a"}))
    with pytest.raises(InvalidArgumentError, match="use InputProcessor"):
        llm._core.add_request(request)
