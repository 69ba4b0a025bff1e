from __future__ import annotations

import pytest

from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.input_processor import InputProcessor
from lora_serve.engine.messages import EngineOutput, ModelInfo, PositionLogprobs, WireError
from lora_serve.engine.output_merger import OutputMerger
from lora_serve.engine.output_processor import OutputProcessor

from .tokenizers_for_tests import byte_level_bpe

INFO = ModelInfo(
    model="m",
    max_model_len=256,
    vocab_size=330,
    eos_token_ids=[1],
    page_size=4,
    num_device_pages=64,
    num_host_pages=0,
    max_num_seqs=8,
    max_loras=4,
)
TOKENIZER = byte_level_bpe()


class OneRequest:
    """Feeds one request's tokens and joins what comes out."""

    def __init__(self, **params):
        self.processor = OutputProcessor(TOKENIZER)
        params = SamplingParams(**{"max_tokens": 100, **params})
        self.request = InputProcessor(INFO).process("r", "hello", TOKENIZER.encode("hello"), params, None)
        self.processor.add(self.request)
        self.ids = self.request.engine_request_ids
        self.merger = OutputMerger()
        self.deltas = []

    def feed(self, token_ids, index=0, **fields):
        output = EngineOutput(request_id=self.ids[index], new_token_ids=list(token_ids), **fields)
        processed = self.processor.process([output])
        for delta in processed.deltas:
            self.deltas.append(delta)
            self.merger.add(delta)
        return processed

    def feed_text(self, text, finish_reason=None, stop_reason=None):
        token_ids = TOKENIZER.encode(text)
        for position, token_id in enumerate(token_ids):
            is_last = position == len(token_ids) - 1
            processed = self.feed(
                [token_id],
                finish_reason=finish_reason if is_last else None,
                stop_reason=stop_reason if is_last else None,
            )
            if "r" not in self.processor:
                return processed, position + 1
        return processed, len(token_ids)

    @property
    def answer(self):
        return self.merger.result().outputs[0]


def test_text_of_whole_characters_and_all_tokens_reach_the_reader():
    one = OneRequest()
    one.feed_text("héllo 😀 world", finish_reason="length")
    assert one.answer.text == "héllo 😀 world"
    assert one.answer.token_ids == TOKENIZER.encode("héllo 😀 world")
    assert one.answer.finish_reason == "length"
    assert one.deltas[-1].finished
    assert not any("\ufffd" in part.text for delta in one.deltas for part in delta.outputs)


@pytest.mark.parametrize(
    ("include", "expected"), [(False, "the quick brown "), (True, "the quick brown fox j")]
)
def test_stop_string_across_tokens_ends_the_answer_and_tells_the_engine(include, expected):
    one = OneRequest(stop="fox j", include_stop_str_in_output=include)
    processed, num_fed = one.feed_text("the quick brown fox jumps over")
    assert one.answer.text == expected
    assert (one.answer.finish_reason, one.answer.stop_reason) == ("stop", "fox j")
    assert len(one.answer.token_ids) == num_fed < len(TOKENIZER.encode("the quick brown fox jumps over"))
    assert processed.engine_ids_to_finish == one.ids
    assert processed.deltas[0].finished


def test_tokens_behind_the_stop_string_in_one_output_are_dropped():
    one = OneRequest(stop="lo")
    token_ids = TOKENIZER.encode("bel lo world")
    processed = one.feed(token_ids)
    assert one.answer.text == "bel "
    assert TOKENIZER.decode(one.answer.token_ids).startswith("bel lo")
    assert len(one.answer.token_ids) < len(token_ids)
    assert processed.engine_ids_to_finish == one.ids
    assert one.feed(token_ids).deltas == []


def test_stop_string_found_with_the_last_token_wins_and_the_engine_needs_no_word():
    one = OneRequest(stop="ld")
    processed, _ = one.feed_text("hello world", finish_reason="length")
    assert (one.answer.text, one.answer.finish_reason) == ("hello wor", "stop")
    assert one.answer.stop_reason == "ld"
    assert processed.engine_ids_to_finish == []


def test_start_of_a_stop_string_is_shown_when_the_answer_ends():
    one = OneRequest(stop="world!")
    one.feed_text("hello world", finish_reason="length")
    assert one.answer.text == "hello world"


@pytest.mark.parametrize(("include", "expected"), [(False, "hello"), (True, "hello.")])
def test_stop_token_is_counted_but_not_shown_unless_asked_for(include, expected):
    one = OneRequest(stop_token_ids=[TOKENIZER.encode(".")[0]], include_stop_str_in_output=include)
    one.feed_text("hello")
    dot = TOKENIZER.encode(".")[0]
    one.feed([dot], finish_reason="stop", stop_reason=dot)
    assert one.answer.text == expected
    assert one.answer.token_ids[-1] == dot
    assert one.answer.stop_reason == dot


def test_stop_strings_within_min_tokens_do_not_count():
    token_ids = TOKENIZER.encode("aXbXc")
    assert len(token_ids) == 5
    one = OneRequest(stop="X", min_tokens=2)
    one.feed_text("aXbXc")
    assert one.answer.text == "aXb"


def test_logprobs_are_decoded_and_summed():
    one = OneRequest(logprobs=2)
    entry = PositionLogprobs(token_ids=[70, 71, 70], logprobs=[-1.5, -0.5, -1.5], ranks=[2, 1, 2])
    one.feed([70], logprobs=[entry])
    one.feed([70], logprobs=[entry], finish_reason="length")
    position = one.answer.logprobs[1]
    assert list(position) == [70, 71]
    assert (position[70].logprob, position[70].rank) == (-1.5, 2)
    assert position[71].decoded_token == TOKENIZER.decode([71])
    assert one.answer.cumulative_logprob == -3.0
    assert len(one.answer.logprobs) == 2


def test_prompt_logprobs_come_once_with_the_first_output():
    one = OneRequest(prompt_logprobs=0, n=2)
    entry = PositionLogprobs(token_ids=[70], logprobs=[-0.25], ranks=[1])
    one.feed([70], index=0, prompt_logprobs=[None, entry])
    one.feed([70], index=1, prompt_logprobs=[None, entry])
    assert [delta.prompt_logprobs is not None for delta in one.deltas] == [True, False]
    assert one.merger.result().prompt_logprobs[1][70].logprob == -0.25


def test_answers_of_one_request_end_on_their_own():
    one = OneRequest(n=3)
    a, b, c = (TOKENIZER.encode(char)[0] for char in "abc")
    one.feed([b], index=1, finish_reason="length", num_cached_tokens=4)
    one.feed([a], index=0, finish_reason="stop", num_cached_tokens=8)
    assert not one.deltas[-1].finished
    one.feed([c], index=2, finish_reason="length")
    assert one.deltas[-1].finished
    merged = one.merger.result()
    assert [answer.index for answer in merged.outputs] == [0, 1, 2]
    assert [answer.finish_reason for answer in merged.outputs] == ["stop", "length", "length"]
    assert merged.num_cached_tokens == 8
    assert merged.finished


def test_failure_of_one_answer_fails_the_request_and_stops_the_others():
    one = OneRequest(n=3)
    error = WireError("InvalidArgumentError", "no good")
    processed = one.feed([], index=1, finish_reason="abort", error=error)
    [(request_id, raised)] = processed.failures
    assert request_id == "r"
    assert isinstance(raised, InvalidArgumentError)
    assert processed.engine_ids_to_finish == [one.ids[0], one.ids[2]]
    assert processed.deltas == []
    assert one.feed([70], index=0).deltas == []


def test_failure_drops_what_the_same_step_gave_to_the_request():
    one = OneRequest(n=2)
    outputs = [
        EngineOutput(request_id=one.ids[0], new_token_ids=[70]),
        EngineOutput(request_id=one.ids[1], error=WireError("InternalError", "x"), finish_reason="abort"),
    ]
    processed = one.processor.process(outputs)
    assert processed.deltas == []
    assert len(processed.failures) == 1


def test_removed_request_gets_nothing_and_names_what_the_engine_still_runs():
    one = OneRequest(n=2)
    one.feed([70], index=0, finish_reason="length")
    assert one.processor.remove("r") == [one.ids[1]]
    assert one.processor.remove("r") == []
    assert one.feed([70], index=1).deltas == []


def test_live_id_cannot_be_added_again():
    one = OneRequest()
    with pytest.raises(InternalError, match="'r' is live"):
        one.processor.add(one.request)


@pytest.mark.parametrize("error", [InvalidArgumentError("a"), ValueError("b")])
def test_error_crosses_the_wire_with_its_class_and_message(error):
    raised = WireError.from_exception(error).to_exception()
    if isinstance(error, InvalidArgumentError):
        assert type(raised) is InvalidArgumentError
        assert str(raised) == "a"
    else:
        assert type(raised) is InternalError
        assert str(raised) == "ValueError: b"


def test_error_of_a_class_that_the_other_side_lacks_crosses_as_its_base():
    class SpecialError(InvalidArgumentError):
        pass

    assert type(WireError.from_exception(SpecialError("s")).to_exception()) is InvalidArgumentError
    assert type(WireError("NoSuchClass", "m").to_exception()) is InternalError
