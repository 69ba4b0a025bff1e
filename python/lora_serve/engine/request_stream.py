"""The answers to one submitted prompt, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from lora_serve.common.errors import LoraServeError
from lora_serve.common.outputs import RequestOutput
from lora_serve.engine.messages import AdmissionResult
from lora_serve.engine.output_merger import OutputMerger


class StreamObserver(Protocol):
    """Is told what becomes of one stream, in the event loop, before its reader: it must return at once."""

    def on_output(self, output: RequestOutput) -> None:
        """Take the next delta, which has just arrived."""

    def on_failure(self) -> None:
        """Take note that the request has failed; nothing more comes."""

    def on_abandoned(self) -> None:
        """Take note that the reader went away before the end; nothing more comes."""


class RequestStream:
    """The answers to one submitted prompt, as they come: an asynchronous iterator of deltas.

    Every RequestOutput carries only what is new: text, token ids and log probabilities since the one before,
    with an entry in `outputs` for each answer that has something new or has just finished.
    `prompt_logprobs` comes once, with the first output. Leaving the stream early (`aclose`, the end of
    `async with`, cancelling the task that waits in it) aborts what still runs.

    Attributes
    ----------
    request_id : str
        The caller's id.
    prompt : str or None
        The prompt's text; None when it came as token ids.
    prompt_token_ids : list of int
        The prompt as the model reads it.
    lora_name : str or None
        The adapter; None = the base model.
    adapter_id : int
        The adapter's generation; 0 = the base model.
    content_digest : str
        The generation's content digest in hex; empty for the base model.
    observer : StreamObserver or None
        Whom to tell what becomes of it.
    """

    def __init__(
        self,
        *,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        lora_name: str | None,
        abort: Callable[[], None],
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.lora_name = lora_name
        self.adapter_id = 0
        self.content_digest = ""
        self.observer: StreamObserver | None = None
        self._abort = abort
        self._queue: asyncio.Queue[RequestOutput | LoraServeError] = asyncio.Queue()
        self._is_done = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """Give the next delta.

        Raises
        ------
        LoraServeError
            The request failed: InternalError when the engine stopped, else why this request could not go on.
        """
        if self._is_done:
            raise StopAsyncIteration
        try:
            item = await self._queue.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, LoraServeError):
            self._is_done = True
            raise item
        if item.finished:
            self._is_done = True
        return item

    async def collect(self) -> RequestOutput:
        """Wait for the end and give everything at once, with all `n` outputs by index.

        Raises
        ------
        LoraServeError
            As for iteration.
        """
        merger = OutputMerger()
        async for output in self:
            merger.add(output)
        return merger.result()

    async def aclose(self) -> None:
        """Abort what still runs. Closing twice, or after the end, changes nothing."""
        if not self._is_done:
            self._is_done = True
            self._abort()
            self._end_observation()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # --- For the client -----------------------------------------------------------------------------------

    def set_admission(self, admission: AdmissionResult) -> None:
        """Take the engine's answer to the submission."""
        self.adapter_id = admission.adapter_id
        self.content_digest = admission.content_digest

    def put(self, item: RequestOutput | LoraServeError) -> None:
        """Hand the next delta, or the error that ends the stream, to the reader."""
        if self.observer is not None:
            if isinstance(item, LoraServeError):
                self.observer.on_failure()
                self.observer = None
            else:
                self.observer.on_output(item)
                if item.finished:
                    self.observer = None
        self._queue.put_nowait(item)

    def _end_observation(self) -> None:
        observer, self.observer = self.observer, None
        if observer is not None:  # Else all of it has arrived, only nobody reads it.
            observer.on_abandoned()
