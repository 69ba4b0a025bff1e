from __future__ import annotations

import pytest
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.input_processor import InputProcessor, PromptTokenizer, max_chars_per_token
from lora_serve.engine.messages import ModelInfo
from lora_serve.engine.tokenizer import Tokenizer

from .tokenizers_for_tests import byte_fallback, byte_level_bpe

INFO = ModelInfo(
    model="m",
    max_model_len=16,
    vocab_size=100,
    eos_token_ids=[1],
    page_size=4,
    num_device_pages=64,
    num_host_pages=0,
    max_num_seqs=8,
    max_loras=4,
)


def process(token_ids, lora_name=None, **params):
    return InputProcessor(INFO).process("r", None, token_ids, SamplingParams(**params), lora_name)


def test_max_tokens_of_none_is_what_the_context_holds():
    request = process([5, 6, 7], max_tokens=None)
    assert request.sampling_params.max_tokens == 13
    assert request.engine_requests[0].sampling_params.max_tokens == 13


def test_prompt_and_answer_may_fill_the_context_exactly():
    assert process([5] * 15, max_tokens=1).engine_requests[0].prompt_token_ids == [5] * 15
    assert process([5] * 15, max_tokens=None).sampling_params.max_tokens == 1


@pytest.mark.parametrize(
    ("token_ids", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([5] * 16, {}, r"prompt has 16 tokens but max_model_len is 16.*shorten the prompt to 15"),
        ([5] * 10, {"max_tokens": 7}, r"max_tokens is 7 but a prompt of 10 tokens leaves 6 .*at most 6"),
        ([5] * 10, {"max_tokens": None, "min_tokens": 7}, r"min_tokens is 7 .* leaves 6"),
        ([5, 100], {"max_tokens": 1}, r"the prompt has the token id 100 .* \[0, 100\)"),
        ([5, -1], {"max_tokens": 1}, "token id -1"),
        (["a"], {"max_tokens": 1}, "token id 'a'"),
        ([True], {"max_tokens": 1}, "token id True"),
        ([1.0], {"max_tokens": 1}, r"token id 1\.0"),
        ([5], {"max_tokens": 1, "stop_token_ids": [100]}, "stop_token_ids has the token id 100"),
        ([5], {"max_tokens": 1, "logit_bias": {100: 1.0}}, "logit_bias has the token id 100"),
    ],
)
def test_bad_request_is_refused_with_what_was_found_and_what_to_do(token_ids, params, message):
    with pytest.raises(InvalidArgumentError, match=message):
        process(token_ids, **params)


@pytest.mark.parametrize("name", ["", 5, "\ud800"])
def test_adapter_name_that_is_none_is_refused(name):
    with pytest.raises(InvalidArgumentError, match="lora_name"):
        process([5], lora_name=name, max_tokens=1)


def test_answers_have_ids_and_seeds_of_their_own_over_all_requests():
    processor = InputProcessor(INFO)
    first = processor.process("a", None, [5], SamplingParams(n=2, seed=7, max_tokens=4), "x")
    second = processor.process("b", None, [5], SamplingParams(n=2, max_tokens=4), None)
    ids = first.engine_request_ids + second.engine_request_ids
    assert len(set(ids)) == 4
    assert [request.sampling_params.seed for request in first.engine_requests] == [7, 8]
    assert {request.lora_name for request in first.engine_requests} == {"x"}
    assert {request.lora_name for request in second.engine_requests} == {None}


# --- Text that cannot fit ---------------------------------------------------------------------------------


def make_tokenizer(
    vocabulary=(*"abcdé ", "abcd"),
    *,
    normalizer=None,
    pre_tokenizer=None,
    added=(),
    merges=(),
    unk_token="<u>",
    fuse_unk=False,
):
    """A BPE over characters, whose unknown characters are one token each unless the options say otherwise."""
    pieces = [*vocabulary, "<u>"]
    backend = Backend(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=list(merges),
            unk_token=unk_token,
            fuse_unk=fuse_unk,
        )
    )
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.add_tokens(list(added))
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


BOUNDED = {
    "byte_level": (byte_level_bpe, None),
    "byte_fallback": (byte_fallback, 6),
    "characters": (make_tokenizer, 4),
    "nfc": (lambda: make_tokenizer(normalizer=normalizers.NFC()), 16),
    "replace": (lambda: make_tokenizer(normalizer=normalizers.Replace("abcde", "ab")), 12),
    "nested": (
        lambda: make_tokenizer(
            normalizer=normalizers.Sequence([normalizers.Sequence([normalizers.NFKC()]), normalizers.NFC()])
        ),
        64,
    ),
    "grown_added": (
        lambda: make_tokenizer(
            normalizer=normalizers.Replace("d", "ddddddddd"), added=[AddedToken("dd", normalized=True)]
        ),
        18,
    ),
    "split": (
        lambda: make_tokenizer(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex("a+"), "isolated"), pre_tokenizers.Digits()]
            )
        ),
        4,
    ),
}
UNBOUNDED = {
    "strip": lambda: make_tokenizer(normalizer=normalizers.Strip()),
    "strip_in_sequence": lambda: make_tokenizer(
        normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    ),
    "strip_accents": lambda: make_tokenizer(normalizer=normalizers.StripAccents()),
    "replace_by_nothing": lambda: make_tokenizer(normalizer=normalizers.Replace("a", "")),
    "replace_regex": lambda: make_tokenizer(normalizer=normalizers.Replace(Regex(" +"), " ")),
    "removed_spaces": lambda: make_tokenizer(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "removed_split": lambda: make_tokenizer(pre_tokenizer=pre_tokenizers.Split("a", "removed")),
    "greedy_added": lambda: make_tokenizer(added=[AddedToken("dd", rstrip=True)]),
    "fused_unknown": lambda: make_tokenizer(fuse_unk=True),
    "dropped_unknown": lambda: make_tokenizer(unk_token=None),
    "byte_level_with_gaps": lambda: make_tokenizer(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False), unk_token=None
    ),
}
TEXTS = [
    "a",
    " ",
    "x",
    "é",
    "e\u0301",
    "\u03b1\u0313\u0300\u0345",
    "日",
    "😀",
    "abcd",
    "abcde",
    "dd",
    "hello ",
    "dd    ",
]


@pytest.mark.parametrize("name", BOUNDED)
def test_text_is_refused_only_when_its_tokens_do_not_fit(name):
    make, bound = BOUNDED[name]
    tokenizer = make()
    if bound is not None:
        assert max_chars_per_token(tokenizer) == bound
    limit = (INFO.max_model_len - 1) * max_chars_per_token(tokenizer)
    prompts = PromptTokenizer(tokenizer, INFO.max_model_len)
    for text in TEXTS:
        too_long = (text * (limit + 1))[: limit + 1]
        assert prompts.encode(too_long[:-1]) == tokenizer.encode(too_long[:-1])
        with pytest.raises(InvalidArgumentError, match=rf"has {limit + 1} characters.*at most {limit} char"):
            prompts.encode(too_long)
        assert len(tokenizer.encode(too_long)) >= INFO.max_model_len


@pytest.mark.parametrize("name", UNBOUNDED)
def test_text_of_any_length_is_tokenised_when_one_token_may_stand_for_all_of_it(name):
    tokenizer = UNBOUNDED[name]()
    assert max_chars_per_token(tokenizer) is None
    text = "dd" + " a" * 1000
    assert PromptTokenizer(tokenizer, INFO.max_model_len).encode(text) == tokenizer.encode(text)


def test_tokenizer_of_another_kind_has_no_bound():
    class Slow:
        def encode(self, text, add_special_tokens=True):
            return [5]

    assert PromptTokenizer(Tokenizer(Slow()), INFO.max_model_len).encode("x" * 10_000) == [5]


def test_longest_token_may_fill_the_context():
    tokenizer = make_tokenizer([*"abcd", "ab", "cd", "abcd"], merges=[("a", "b"), ("c", "d"), ("ab", "cd")])
    prompts = PromptTokenizer(tokenizer, INFO.max_model_len)
    assert len(prompts.encode("abcd" * 15)) == 15
    with pytest.raises(InvalidArgumentError):
        prompts.encode("abcd" * 15 + "a")
