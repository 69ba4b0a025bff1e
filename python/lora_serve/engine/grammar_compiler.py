"""Compiles the grammars of structured answers, once each, on a thread of its own."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.common.structured_outputs import GrammarForm, GrammarSource
from lora_serve.engine.fair_threads import FairThreads
from lora_serve.executor.grammar_matcher import GrammarMatcher

if TYPE_CHECKING:
    import xgrammar

MAX_MASK_S = 0.02
"""Most time that a grammar may take for its first mask: masks are filled in the steps of everybody."""
MAX_WHITESPACE = 16
"""Longest run of white space in JSON: enough for indents, and no answer is nothing but that."""
CACHE_BYTES = 256 * 1024 * 1024
"""Compiled grammars that are kept, at most; requests that run keep theirs beyond."""
MAX_FAILURES = 64
"""Wrong grammars that are remembered, so that nobody compiles them again at once."""
MAX_THREADS = 4
"""Most grammars compiled at once, each for another owner."""
CORES_FOR_STEPS = 2
"""Cores on which nothing is compiled, where there are more: for the engine's steps and the HTTP server."""
_LOG_PREFIX = re.compile(r"^\[[\d:]+\] \S+: (Check failed: \(.*?\) is false: )?")


@dataclass(eq=False)
class _Compilation:
    """One grammar on its way.

    Parameters
    ----------
    future
        Whose result is the grammar. Cancelled when nobody waits for it any more, unless it has begun.
    jobs
        For each owner who has asked for it, what waits for its turn: it is compiled in the first one's.
    turn
        Taken by the thread that compiles it.
    """

    future: Future[xgrammar.CompiledGrammar] = field(default_factory=Future)
    jobs: dict[Hashable, Callable[[], None]] = field(default_factory=dict)
    turn: threading.Lock = field(default_factory=threading.Lock)


class GrammarCompiler:
    """Compiles grammars for one model's vocabulary, and remembers them by what they were made from.

    Compiling takes from a millisecond to seconds, with the interpreter lock released; reading the tokenizer,
    which the first grammar needs, may hold it for some hundred milliseconds. `load` does that ahead of need.
    Nothing can interrupt it. So whoever asks for forms that take long waits for them one after the other, and
    others pass: see `FairThreads`.

    Owns the threads, the vocabulary as xgrammar has it, and the grammars, of which the least recently used go
    when they take too much memory. One thread calls the methods.

    Parameters
    ----------
    model : str
        The Hugging Face directory or hub id whose tokenizer is read.
    vocab_size : int
        Number of logits.
    eos_token_ids : tuple of int
        Tokens that end an answer whose form is complete.
    """

    def __init__(self, model: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._threads = FairThreads(_count_threads(), "lora-serve-grammars")
        self._vocabulary: xgrammar.TokenizerInfo | None = None
        self._vocabulary_lock = threading.Lock()
        self._compiled: OrderedDict[GrammarSource, xgrammar.CompiledGrammar] = OrderedDict()
        self._failed: OrderedDict[GrammarSource, BaseException] = OrderedDict()
        self._under_way: dict[GrammarSource, _Compilation] = {}
        # Of those under way, what has ended since anybody looked: filled by the threads, and by who cancels.
        self._finished: deque[GrammarSource] = deque()

    def load(self) -> None:
        """Read the tokenizer now.

        Raises
        ------
        InvalidArgumentError
            It cannot be read, or the model has no end-of-sequence token: no grammar can be compiled.
        """
        self._load()

    def prepare(self, forms: Iterable[GrammarForm | None], owner: Hashable = None) -> list[Future[Any]]:
        """Begin to compile what nobody has compiled.

        Parameters
        ----------
        forms : iterable of (GrammarForm or None)
            Of the answers that are wanted.
        owner
            Who wants them, and waits if it has wanted others before that take long.

        Returns
        -------
        list of Future
            To wait for before `matcher` is called, which raises what has failed; empty = all is there. Who
            does not wait any more, and knows of nobody else who does, may cancel them.
        """
        wanted = {form.source for form in forms if form is not None}
        self._take_finished()
        waits_for: list[Future[Any]] = []
        for source in sorted(wanted):
            if source in self._compiled or source in self._failed:
                continue
            compilation = self._under_way.get(source) or self._begin(source)
            if compilation.future.done():
                continue
            waits_for.append(compilation.future)
            if owner not in compilation.jobs:
                compilation.jobs[owner] = partial(self._run, source, compilation)
                self._threads.add(owner, compilation.jobs[owner])
        return waits_for

    def matcher(self, form: GrammarForm | None) -> GrammarMatcher | None:
        """Give a new answer's matcher; None when its form is free.

        Waits for the grammar where `prepare` was not called, or not waited for.

        Raises
        ------
        InvalidArgumentError
            The schema, expression or grammar is wrong, or there is no tokenizer to compile it for.
        """
        if form is None:
            return None
        source = form.source
        while source not in self._compiled and source not in self._failed:
            wait(self.prepare([form]))
            self._take(source)
        error = self._failed.get(source)
        if error is not None:
            self._failed.move_to_end(source)
            raise type(error)(str(error))
        self._compiled.move_to_end(source)
        return GrammarMatcher(self._compiled[source], self._vocab_size, form.reasoning)

    def close(self) -> None:
        """End the threads after the grammars that they compile, without waiting."""
        self._threads.close()

    def _begin(self, source: GrammarSource) -> _Compilation:
        compilation = self._under_way[source] = _Compilation()
        compilation.future.add_done_callback(lambda _: self._finished.append(source))
        return compilation

    def _take_finished(self) -> None:
        while self._finished:
            self._take(self._finished.popleft())

    def _take(self, source: GrammarSource) -> None:
        """Keep what was compiled, or why it could not be: whoever asks again does not wait again."""
        compilation = self._under_way.get(source)
        if compilation is None or not compilation.future.done():
            return  # It was taken before, and may be under way again.
        del self._under_way[source]
        for owner, job in compilation.jobs.items():  # They would keep the text until each owner's turn.
            self._threads.drop(owner, job)
        compilation.jobs.clear()
        future = compilation.future
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._compiled[source] = future.result()
        else:
            self._failed[source] = error
        while len(self._failed) > MAX_FAILURES:
            self._failed.popitem(last=False)
        while len(self._compiled) > 1 and self._num_bytes() > CACHE_BYTES:
            self._compiled.popitem(last=False)

    def _num_bytes(self) -> int:
        return sum(int(compiled.memory_size_bytes) for compiled in self._compiled.values())

    # --- In the threads -----------------------------------------------------------------------------------

    def _load(self) -> xgrammar.TokenizerInfo:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = _read_vocabulary(self._model, self._vocab_size, self._eos_token_ids)
            return self._vocabulary

    def _run(self, source: GrammarSource, compilation: _Compilation) -> None:
        future = compilation.future
        if not compilation.turn.acquire(blocking=False) or not future.set_running_or_notify_cancel():
            return  # It was compiled in another owner's turn, or nobody waits for it any more.
        try:
            compiled = _compile(_make_backend(self._load()), source)
            _require_an_answer(compiled, source)
            future.set_result(compiled)
        except InvalidArgumentError as error:
            future.set_exception(error)
        except RuntimeError as error:  # xgrammar's errors of input have no class of their own.
            reason = _LOG_PREFIX.sub("", str(error)).strip()
            future.set_exception(
                InvalidArgumentError(
                    f"structured_outputs.{source.kind} cannot be compiled: {reason}; correct it"
                )
            )
        except BaseException as error:
            future.set_exception(InternalError(f"a grammar could not be compiled: {error!r}"))


def _count_threads() -> int:
    # Two at least, also where they take time from the steps: one slow form must not hold up everybody else's.
    return max(2, min(MAX_THREADS, len(os.sched_getaffinity(0)) - CORES_FOR_STEPS))


def _read_vocabulary(model: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> xgrammar.TokenizerInfo:
    import xgrammar

    from lora_serve.engine.tokenizer import Tokenizer

    if not eos_token_ids:
        raise InvalidArgumentError(
            "structured_outputs cannot be served: the model names no end-of-sequence token, so an answer of "
            "a given form could not end; remove structured_outputs, response_format and tool_choice, or set "
            "eos_token_id in the model's config"
        )
    backend = Tokenizer.from_pretrained(model).backend
    info = xgrammar.TokenizerInfo.from_huggingface(
        backend, vocab_size=vocab_size, stop_token_ids=list(eos_token_ids)
    )
    # Special tokens have a text, too, but it is left out of answers: none may stand for a part of the form.
    special = {id_ for id_, token in backend.added_tokens_decoder.items() if token.special}
    vocab = [b"" if id_ in special else entry for id_, entry in enumerate(info.decoded_vocab)]
    return xgrammar.TokenizerInfo(
        vocab,
        xgrammar.VocabType.RAW,
        vocab_size=vocab_size,
        stop_token_ids=list(eos_token_ids),
        add_prefix_space=info.add_prefix_space,
    )


def _make_backend(vocabulary: xgrammar.TokenizerInfo) -> xgrammar.GrammarCompiler:
    """Make a compiler for one thread, which costs microseconds; all share the vocabulary."""
    import xgrammar

    return xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)


def _compile(backend: xgrammar.GrammarCompiler, source: GrammarSource) -> xgrammar.CompiledGrammar:
    if source.kind in ("json", "json_object"):
        schema = source.text or '{"type": "object"}'
        return backend.compile_json_schema(
            schema,
            any_whitespace=source.any_whitespace,
            max_whitespace_cnt=MAX_WHITESPACE if source.any_whitespace else None,
        )
    if source.kind == "regex":
        return backend.compile_regex(source.text)
    if source.kind == "choice":
        choices = [_quote(choice) for choice in msgspec.json.decode(source.text)]
        return backend.compile_grammar(f"root ::= {' | '.join(choices)}")
    if source.kind == "structural_tag":
        return backend.compile_structural_tag(source.text)
    return backend.compile_grammar(source.text)


def _require_an_answer(compiled: xgrammar.CompiledGrammar, source: GrammarSource) -> None:
    import xgrammar

    mask = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
    seconds = math.inf
    for _ in range(2):  # The lesser of two: the first may have waited for memory.
        begin = time.thread_time()
        needs_mask = xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(mask)
        seconds = min(seconds, time.thread_time() - begin)
    if seconds > MAX_MASK_S:
        raise InvalidArgumentError(
            f"structured_outputs.{source.kind} takes {seconds * 1000:.0f} ms to say which token may come "
            f"first, but may take at most {MAX_MASK_S * 1000:.0f} ms, because all of a step wait for "
            "it; make it less ambiguous, such as one repetition in place of many optional parts"
        )
    if needs_mask and not mask.any():
        raise InvalidArgumentError(
            f"structured_outputs.{source.kind} allows no answer at all, such as a schema that is its own; "
            "correct it"
        )


def _quote(text: str) -> str:
    """Write a string literal of the grammar language."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(char, char) for char in text) + '"'
