"""Rows under a grammar: their masks, and their tokens with every kind of executor."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.executor.grammar_matcher import GrammarMatcher
from lora_serve.executor.logit_adjustments import adjust_logits
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.executor.token_restriction import RestrictionError
from lora_serve.testing.models import make_random_model

from .executors import make_executor
from .scheduler_run import SchedulerRun
from .states import make_state

VOCAB = 261
END = 256
PAGE_SIZE = 4
PROMPT = [3, 1, 4, 1, 5]
KINDS = {
    "cpu": {"device": "cpu", "attention_backend": "torch"},
    "interpreted": {"device": "cpu", "attention_backend": "torch"},
    "cuda": {"device": "cuda", "attention_backend": "flashinfer", "dtype": "bfloat16"},
}


class MaskOnly:
    """Stands for a matcher that allows the same tokens for ever."""

    restricts = True

    def __init__(self, allowed, vocab_size):
        bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
        bits[list(allowed)] = 1
        self.mask = np.packbits(bits, bitorder="little").view(np.int32)

    def next_mask(self):
        return self.mask

    def accept(self, token_id):
        pass


@pytest.fixture(scope="module")
def compiler():
    import xgrammar

    vocab = [bytes([i]) for i in range(256)] + [b""] * (VOCAB - 256)
    info = xgrammar.TokenizerInfo(vocab, xgrammar.VocabType.RAW, stop_token_ids=[END])
    return xgrammar.GrammarCompiler(info, max_threads=1)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_random_model(path, "Qwen3ForCausalLM", vocab_size=VOCAB)
    return str(path)


@pytest.fixture(scope="module", params=["cpu", "interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def executor(request, model_path):
    if request.param != "cpu":
        pytest.importorskip("triton", reason="CUDA's executor runs its kernels")
    options = {"page_size": PAGE_SIZE, "num_device_pages": 64, "max_num_seqs": 8, "max_model_len": 64}
    options |= {"lora_memory_gb": 2**-7, "lora_host_memory_gb": 2**-7, **KINDS[request.param]}
    executor = make_executor(request.param, EngineConfig(model=model_path, **options))
    yield executor
    executor.close()


def state_of(compiler, regex, **params):
    matcher = GrammarMatcher(compiler.compile_regex(regex), VOCAB)
    sampling_params = SamplingParams(max_tokens=None, **{"temperature": 0.0, **params})
    prompt = np.array(PROMPT, dtype=np.int32)
    return SamplingState(sampling_params, prompt, (END,), VOCAB, sampling_params.seed, matcher)


def run(executor, states, max_tokens, max_in_flight):
    """The tokens of requests that run side by side to their end token or their limit."""
    run = SchedulerRun(
        executor,
        max_in_flight=max_in_flight,
        page_size=PAGE_SIZE,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
    )
    for request_id, state in enumerate(states, start=1):
        run.add(request_id, state, max_tokens)
    while len(run.ended) < len(states):
        run.step()
        for request_id, tokens in run.outputs.items():
            if END in tokens and request_id not in run.ended:
                run.abort(request_id)
    while run.in_flight:
        run.step()
    return [list(run.outputs[request_id]) for request_id in range(1, len(states) + 1)]


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 261])
def test_only_masked_rows_lose_tokens_and_only_those_that_are_not_allowed(vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(1))
    allowed = {1: {0, vocab_size - 1}, 3: set(rng.choice(vocab_size, 7, replace=False).tolist())}
    states = [make_state(vocab_size=vocab_size) for _ in range(5)]
    for row, tokens in allowed.items():
        states[row].restriction = MaskOnly(tokens, vocab_size)
    adjusted = logits.clone()
    adjust_logits(adjusted, states)
    for row in range(5):
        for token_id in range(vocab_size):
            is_allowed = row not in allowed or token_id in allowed[row]
            expected = logits[row, token_id].item() if is_allowed else -np.inf
            assert adjusted[row, token_id].item() == expected


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_rows_follow_their_grammars_beside_free_rows(executor, compiler, max_in_flight):
    free = [make_state(PROMPT, vocab_size=VOCAB, temperature=0.0) for _ in range(2)]
    [alone] = run(executor, free[:1], 8, max_in_flight)
    states = [
        state_of(compiler, "[0-9]{2}-[a-f]{4}"),
        free[1],
        state_of(compiler, "(ab|ba){2}", temperature=1.0, seed=7, top_p=0.9),
        state_of(compiler, "[xyz]{8,20}", frequency_penalty=1.5, logprobs=2),
    ]
    first, beside, second, third = run(executor, states, 8, max_in_flight)
    if executor.model_config.dtype == torch.float32:  # Else the shapes of the two steps round differently.
        assert beside == alone
    assert re.fullmatch(rb"[0-9]{2}-[a-f]{4}", bytes(first[:-1]))
    assert re.fullmatch(rb"(ab|ba){2}", bytes(second[:-1]))
    assert first[-1] == second[-1] == END
    assert re.fullmatch(rb"[xyz]{8}", bytes(third))
    assert len(set(third)) == 3


def test_overlap_changes_no_token_of_a_masked_row(executor, compiler):
    def tokens(max_in_flight):
        states = [state_of(compiler, "([a-m][n-z]){10}", temperature=1.0, seed=seed) for seed in range(3)]
        return run(executor, states, 6, max_in_flight)

    assert tokens(1) == tokens(2)
    assert all(re.fullmatch(rb"([a-m][n-z]){3}", bytes(answer)) for answer in tokens(2))


def test_after_the_end_every_token_may_come_and_none_counts(compiler):
    matcher = GrammarMatcher(compiler.compile_regex("ab"), VOCAB)
    assert matcher.next_mask()[3] == 1 << (ord("a") - 96)
    for token_id in (*b"ab", END):
        assert matcher.restricts
        matcher.accept(token_id)
    assert not matcher.restricts
    assert (matcher.next_mask() == -1).all()
    matcher.accept(5)


def test_a_token_that_was_sampled_without_the_mask_is_a_bug(compiler):
    matcher = GrammarMatcher(compiler.compile_regex("ab"), VOCAB)
    with pytest.raises(RestrictionError, match="does not allow it"):
        matcher.accept(ord("b"))
    assert not matcher.restricts


class BreakingMatcher(GrammarMatcher):
    """Its grammar fails at the third token: at taking it, or at the mask for it."""

    def __init__(self, compiled, method):
        super().__init__(compiled, VOCAB)
        real = self._matcher
        num_calls = 0

        class Breaking:
            def __getattr__(self, name):
                nonlocal num_calls
                if name == method:
                    num_calls += 1
                    if num_calls == 3:
                        raise RuntimeError("it broke")
                return getattr(real, name)

        self._matcher = Breaking()


class RunWithErrors(SchedulerRun):
    """Ends the requests whose rows fail, as the engine does, and keeps why."""

    errors: dict[int, str]

    def _take_oldest(self):
        collect = self.executor.collect

        def collect_and_end():
            result = collect()
            for row, reason in result.row_errors.items():
                request_id = int(self.in_flight[0].request_ids[row])
                self.errors.setdefault(request_id, reason)
                if request_id not in self.ended:
                    self.abort(request_id)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.executor, "collect", collect_and_end)
            return super()._take_oldest()


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize(
    ("method", "message"), [("accept_token", "it broke"), ("fill_next_token_bitmask", "leave none to sample")]
)
def test_a_grammar_that_fails_ends_its_row_and_no_other(executor, compiler, method, message, max_in_flight):
    broken, good = state_of(compiler, "[a-z]{6}"), state_of(compiler, "[a-z]{6}")
    broken.restriction = BreakingMatcher(compiler.compile_regex("[a-z]{6}"), method)
    run = RunWithErrors(
        executor,
        max_in_flight=max_in_flight,
        page_size=PAGE_SIZE,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
    )
    run.errors = {}
    for request_id, state in ((1, broken), (2, good)):
        run.add(request_id, state, 7)
    while len(run.ended) < 2 or run.in_flight:
        run.step()
    assert message in run.errors[1]
    assert list(run.outputs[1]) == list(run.outputs[2])[:2], "it ends with the step that failed"
    assert bytes(run.outputs[2][:6]).isalpha()
    assert 2 not in run.errors
