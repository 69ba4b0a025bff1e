"""The server's side of the engine process."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InternalError, InvalidArgumentError, LoraServeError
from lora_serve.common.field_checks import check_adapter_weight, check_text
from lora_serve.common.outputs import RequestOutput
from lora_serve.common.queueing import DEFAULT_QUEUEING, Queueing
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine import wire
from lora_serve.engine.engine_connection import EngineConnection
from lora_serve.engine.input_processor import InputProcessor, ProcessedRequest, PromptTokenizer
from lora_serve.engine.isolation import DEFAULT_DOMAIN
from lora_serve.engine.messages import (
    AdmissionResult,
    EngineOutput,
    LoadAdapterResult,
    ModelInfo,
    UnloadAdapterResult,
)
from lora_serve.engine.output_processor import OutputProcessor
from lora_serve.engine.request_stream import RequestStream, StreamObserver
from lora_serve.engine.shared_call import SharedCall
from lora_serve.engine.status import AdapterInfo, EngineStats
from lora_serve.engine.tokenizer import Tokenizer

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class LoadedAdapter:
    """How an adapter that serves was loaded.

    Parameters
    ----------
    name, path, pinned, weight
        As of `AsyncEngineClient.load_lora_adapter`.
    content_digest : str
        What was read then.
    adapter_id : int
        The generation that its name stands for.
    """

    name: str
    path: str
    pinned: bool
    weight: float
    content_digest: str
    adapter_id: int


class AsyncEngineClient:
    """Runs an engine in a process of its own and speaks to it, from one asyncio event loop.

    Tokenising and detokenising happen in this process. When the engine process ends, every call in flight
    and every stream fails with InternalError at once, and so does every later call.

    Parameters
    ----------
    config : EngineConfig
        What the engine runs.
    executor_factory : str or None
        'module:function' of a callable that takes the config and gives an Executor, for tests; None = the
        model's executor.

    Attributes
    ----------
    config : EngineConfig
        As given.
    model_info : ModelInfo
        What the engine said when it was ready; set by `start`.
    tokenizer : Tokenizer
        For decoding in the event loop's thread; set by `start`.
    observe : callable or None
        Gives the observer of each accepted stream; takes the stream, the number of its answers, and when
        `submit` was called, as time.perf_counter gives it.
    """

    config: EngineConfig
    model_info: ModelInfo
    tokenizer: Tokenizer

    def __init__(self, config: EngineConfig, *, executor_factory: str | None = None) -> None:
        self.config = config
        self.observe: Callable[[RequestStream, int, float], StreamObserver] | None = None
        self._executor_factory = executor_factory
        self._connection = self._make_connection()
        self._loaded: dict[str, LoadedAdapter] = {}
        self._has_failed = asyncio.Event()
        self._streams: dict[str, RequestStream] = {}
        self._list_adapters = SharedCall(self._ask_for_adapters)
        # Tokenising has a thread and a tokenizer of its own: a long prompt holds up nobody's stream. Prompts
        # wait for each other here, so the tokenizer refuses text that cannot fit before it begins.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="lora-serve-encoder")

    async def start(self) -> None:
        """Start the process and wait until it can serve.

        Raises
        ------
        LoraServeError
            The engine could not start; the class and the message are the process's own (InvalidArgumentError
            for a bad configuration or checkpoint, InternalError when it died).
        """
        load_tokenizer = asyncio.create_task(asyncio.to_thread(Tokenizer.from_pretrained, self.config.model))
        try:
            self.model_info = await self._connection.start(self.config)
            self.tokenizer = await load_tokenizer
            self._encoder_tokenizer = await asyncio.to_thread(
                PromptTokenizer, self.tokenizer.copy(), self.model_info.max_model_len
            )
        except BaseException:
            await asyncio.gather(load_tokenizer, return_exceptions=True)
            await self.close()
            raise
        self._input_processor = InputProcessor(self.model_info)
        self._output_processor = OutputProcessor(self.tokenizer)

    async def restart(self) -> None:
        """Start another process in place of one that has ended, with the same configuration and no adapters.

        Until then, and when it fails, every call fails as before.

        Raises
        ------
        LoraServeError
            As of `start`; or InternalError when the process has not ended.
        """
        if self._connection.is_healthy:
            raise InternalError("the engine runs; only one that has ended is started again")
        self._loaded = {}
        await self._connection.close()
        connection = self._make_connection()
        try:
            await connection.start(self.config)
        except BaseException:
            await connection.close()
            raise
        self._has_failed.clear()
        self._connection = connection

    async def wait_for_failure(self) -> None:
        """Return when the engine's process has ended, or at once when it has since the last (re)start."""
        await self._has_failed.wait()

    @property
    def loaded_adapters(self) -> list[LoadedAdapter]:
        """What serves, in the order of the loads; kept when the process ends, until `restart`.

        What the engine could not bring back, because its folder has changed, does not serve any more.
        """
        return list(self._loaded.values())

    async def submit(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams,
        *,
        lora_name: str | None = None,
        request_id: str | None = None,
        queueing: Queueing = DEFAULT_QUEUEING,
        isolation_domain: bytes = DEFAULT_DOMAIN,
    ) -> RequestStream:
        """Hand a request to the engine; return once it is accepted and its adapter is resolved.

        Parameters
        ----------
        prompt : str or sequence of int
            Text (tokenised with the tokenizer's special tokens) or token ids, not empty.
        sampling_params : SamplingParams
            With `n` answers.
        lora_name : str or None
            The adapter; None = the base model.
        request_id : str or None
            The caller's id, for outputs and `abort`; None = one is made up.
        queueing : Queueing
            Priority, and how long the request may wait.
        isolation_domain : bytes
            From `make_domain`: prefixes are shared within one domain only.

        Returns
        -------
        RequestStream
            Iterate it for deltas, or `await stream.collect()` for the whole. Its `adapter_id` is set.

        Raises
        ------
        AdapterNotFoundError
            No adapter of this name serves.
        InvalidArgumentError
            Prompt or parameters are wrong for this model, or `request_id` is in use.
        CapacityError
            A limit on what waits is reached; none of its answers is computed.
        InternalError
            The engine has stopped.
        """
        arrived_at = time.perf_counter()
        self._connection.require_healthy()
        text = prompt if isinstance(prompt, str) else None
        token_ids = await self.encode(prompt) if isinstance(prompt, str) else prompt
        if request_id is None:
            request_id = uuid.uuid4().hex
        if request_id in self._streams:
            raise InvalidArgumentError(f"request_id {request_id!r} is in use; choose another")
        request = self._input_processor.process(
            request_id, text, token_ids, sampling_params, lora_name, queueing, isolation_domain
        )
        stream = RequestStream(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=request.prompt_token_ids,
            lora_name=lora_name,
            abort=partial(self._drop, request_id),
        )
        self._output_processor.add(request)
        self._streams[request_id] = stream
        try:
            admission = await self._admit(request)
        except BaseException:
            self._drop(request_id)
            raise
        stream.set_admission(admission)
        # Whoever has ended the request meanwhile, by `abort`, has put its end into the stream.
        if self.observe is not None and request_id in self._streams:
            stream.observer = self.observe(stream, sampling_params.n, arrived_at)
        return stream

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams,
        *,
        lora_name: str | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Submit and iterate in one: the deltas of `submit`'s stream. Closing the generator aborts."""
        stream = await self.submit(prompt, sampling_params, lora_name=lora_name, request_id=request_id)
        async with stream:
            async for output in stream:
                yield output

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets final outputs with finish_reason 'abort'. Unknown ids are normal."""
        if request_id in self._streams:
            unfinished = self._output_processor.unfinished_engine_ids(request_id)
            self._connection.send(wire.AbortRequests(unfinished))
            self._take_outputs([EngineOutput(request_id=i, finish_reason="abort") for i in unfinished])

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenise a prompt without holding up the event loop.

        Raises
        ------
        InvalidArgumentError
            The text is longer than any prompt that fits, or has half a surrogate pair.
        """
        return await self._in_encoder(
            lambda tokenizer: tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render the model's chat template and tokenise it, without holding up the event loop.

        Raises
        ------
        InvalidArgumentError
            The tokenizer has no chat template, the template refuses the messages, or what it renders is
            longer than any prompt that fits.
        """
        return await self._in_encoder(
            lambda tokenizer: tokenizer.encode_chat(
                messages, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs
            )
        )

    async def load_lora_adapter(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        pinned: bool = False,
        weight: float = 1.0,
    ) -> LoadAdapterResult:
        """Load an adapter; return when it is ready to serve.

        Parameters, and errors, which are raised here: as of `EngineCore.load_adapter`.
        """
        check_text("lora_name", name)
        check_text("lora_path", path)
        check_adapter_weight(weight)
        result = await self._connection.call(
            lambda call_id: wire.LoadAdapter(call_id, name, path, load_inplace, pinned, weight),
            LoadAdapterResult,
        )
        if result.already_loaded and name in self._loaded:
            path = self._loaded[name].path  # It is still read from there, and belongs to whoever loaded it.
        self._loaded[name] = LoadedAdapter(
            name, path, pinned, weight, result.content_digest, result.adapter_id
        )
        return result

    async def unload_lora_adapter(self, name: str, *, force: bool = False) -> UnloadAdapterResult:
        """Refuse newcomers at once; return when running requests have ended and everything is freed.

        Parameters
        ----------
        name : str
            The adapter.
        force : bool
            Abort its requests instead of waiting for them.

        Raises
        ------
        AdapterNotFoundError
            The name does not serve and no load of it is pending.
        InternalError
            The engine has stopped.
        """
        check_text("lora_name", name)
        self._loaded.pop(name, None)
        result = await self._connection.call(
            lambda call_id: wire.UnloadAdapter(call_id, name, force), UnloadAdapterResult
        )
        # Of loads whose answers were on their way when this call was sent.
        for adapter_id in result.adapter_ids:
            self._forget_loaded(adapter_id)
        return result

    async def list_lora_adapters(self) -> list[AdapterInfo]:
        """Every generation that exists, by adapter id; the ones with `is_serving` are those of /v1/models.

        As of a moment after the call. However many ask, the engine makes one list at a time: `SharedCall`.
        """
        return list(await self._list_adapters())

    async def stats(self) -> EngineStats:
        """Counts over all adapters and the base model."""
        return await self._connection.call(wire.GetStats, EngineStats)

    @property
    def is_healthy(self) -> bool:
        """True between a successful `start` and the end of the process."""
        return self._connection.is_healthy

    @property
    def failure(self) -> str | None:
        """Why the engine does not serve any more; None while it is healthy."""
        return self._connection.failure

    async def close(self) -> None:
        """End the process and fail what is in flight. Closing twice changes nothing."""
        await self._connection.close()
        self._encoder.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> AsyncEngineClient:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- Inside -------------------------------------------------------------------------------------------

    def _make_connection(self) -> EngineConnection:
        return EngineConnection(
            self._executor_factory,
            on_outputs=self._take_outputs,
            on_retired=self._forget_loaded,
            on_failure=self._fail_streams,
        )

    def _forget_loaded(self, adapter_id: int) -> None:
        """Forget a generation that does not serve any more; its name may stand for a newer one."""
        self._loaded = {
            name: adapter for name, adapter in self._loaded.items() if adapter.adapter_id != adapter_id
        }

    async def _ask_for_adapters(self) -> list[AdapterInfo]:
        adapters: list[AdapterInfo] = await self._connection.call(wire.GetAdapters, list)
        return adapters

    async def _admit(self, request: ProcessedRequest) -> AdmissionResult:
        admission = await self._connection.call(
            lambda call_id: wire.AddRequests(call_id, request.engine_requests), AdmissionResult
        )
        self._output_processor.set_adapter_id(request.request_id, admission.adapter_id)
        return admission

    async def _in_encoder(self, encode: Callable[[Tokenizer], _Result]) -> _Result:
        self._connection.require_healthy()
        return await asyncio.get_running_loop().run_in_executor(
            self._encoder, encode, self._encoder_tokenizer
        )

    def _take_outputs(self, outputs: Iterable[EngineOutput]) -> None:
        processed = self._output_processor.process(outputs)
        if processed.engine_ids_to_finish:
            self._connection.send(wire.AbortRequests(processed.engine_ids_to_finish))
        for request_id, error in processed.failures:
            self._streams.pop(request_id).put(error)
        for delta in processed.deltas:
            self._streams[delta.request_id].put(delta)
            if delta.finished:
                del self._streams[delta.request_id]

    def _drop(self, request_id: str) -> None:
        """Forget a request and tell the engine; nothing more is put into its stream."""
        if self._streams.pop(request_id, None) is not None:
            unfinished = self._output_processor.remove(request_id)
            self._connection.send(wire.AbortRequests(unfinished))

    def _fail_streams(self, error: LoraServeError) -> None:
        self._has_failed.set()
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            self._output_processor.remove(request_id)
            stream.put(error)
