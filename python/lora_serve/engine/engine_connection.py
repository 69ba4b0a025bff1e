"""The client's end of the sockets: messages out, replies matched to calls, and the end of the process."""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InternalError, LoraServeError
from lora_serve.engine import wire
from lora_serve.engine.messages import EngineOutput, ModelInfo
from lora_serve.engine.process_handle import SHUTDOWN_TIMEOUT_S, EngineProcessHandle

logger = logging.getLogger(__name__)

LAST_MESSAGES_S = 0.2
"""How long messages that the process sent before its end may take to arrive."""
MAX_ENDPOINT_LENGTH = 100
"""A Unix socket's path has at most 107 characters."""
_Result = TypeVar("_Result")


class EngineConnection:
    """Runs the engine's process and exchanges messages with it, in one event loop.

    Parameters
    ----------
    executor_factory : str or None
        'module:function' that makes the executor; None = the model's.
    on_outputs : callable
        Gets each batch of outputs, in order.
    on_retired : callable
        Gets the generation when its name is taken away by the engine itself.
    on_failure : callable
        Gets the error, once, when the engine does not serve any more; calls have failed then.
    """

    def __init__(
        self,
        executor_factory: str | None,
        *,
        on_outputs: Callable[[list[EngineOutput]], None],
        on_retired: Callable[[int], None],
        on_failure: Callable[[LoraServeError], None],
    ) -> None:
        self._executor_factory = executor_factory
        self._on_outputs = on_outputs
        self._on_retired = on_retired
        self._on_failure = on_failure
        self._decoder = msgspec.msgpack.Decoder(wire.EngineMessage)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._next_call_id = itertools.count()
        self._error: LoraServeError | None = InternalError("the engine was not started; await start() first")
        self._is_ready = False
        self._is_closed = False
        self._folder: str | None = None
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._process: EngineProcessHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_healthy(self) -> bool:
        """True between a successful `start` and the end of the process."""
        return self._error is None

    @property
    def failure(self) -> str | None:
        """Why calls fail; None while healthy."""
        return None if self._error is None else str(self._error)

    @property
    def pid(self) -> int | None:
        """The engine's process id; None before `start`."""
        return None if self._process is None else self._process.pid

    def require_healthy(self) -> None:
        """Raise InternalError when the engine does not serve (any more)."""
        if self._error is not None:
            raise InternalError(str(self._error))

    async def start(self, config: EngineConfig) -> ModelInfo:
        """Start the process and wait until it is ready.

        Raises
        ------
        LoraServeError
            Why it could not start.
        """
        if self._process is not None:
            raise InternalError("the engine was started before; make a new client")
        self._folder = tempfile.mkdtemp(prefix="lora-serve-")
        if len(self._folder) > MAX_ENDPOINT_LENGTH:
            shutil.rmtree(self._folder)
            self._folder = tempfile.mkdtemp(prefix="lora-serve-", dir="/tmp")
        endpoint = f"ipc://{self._folder}/e"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.set(option, 0)
        self._socket.bind(endpoint)
        self._process = EngineProcessHandle(endpoint, self._executor_factory)
        ready: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()
        self._calls[next(self._next_call_id)] = ready
        self._error = None
        self._process.watch(lambda: self._spawn(self._handle_end()))
        self._spawn(self._receive(self._socket, ready))
        self.send(wire.Start(config))
        info = await ready
        self._is_ready = True
        return info

    def send(self, message: wire.ClientMessage) -> None:
        """Send without waiting; dropped when the engine does not serve any more."""
        if self._error is None and self._socket is not None:
            # Without a limit on queued messages the socket takes it at once.
            self._socket.send(wire.encode(message))

    async def call(self, make_message: Callable[[int], wire.ClientMessage], kind: type[_Result]) -> _Result:
        """Send a call and wait for its reply.

        Parameters
        ----------
        make_message : callable
            Takes the call's id.
        kind : type
            What the reply holds.

        Raises
        ------
        LoraServeError
            The reply was an error, or the engine does not serve (any more).
        """
        self.require_healthy()
        call_id = next(self._next_call_id)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = reply
        try:
            self.send(make_message(call_id))
            result = await reply
        finally:
            self._calls.pop(call_id, None)
        if not isinstance(result, kind):
            raise InternalError(f"a call was answered by {type(result).__name__} but expects {kind.__name__}")
        return result

    async def close(self) -> None:
        """End the process and fail what is in flight. Closing twice changes nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self.send(wire.Shutdown())
        self._fail(InternalError("the engine was closed"))
        if self._process is not None:
            # While it loads the model it reads no messages, so it is not waited for.
            await self._process.end(grace_s=SHUTDOWN_TIMEOUT_S if self._is_ready else 0.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
        if self._context is not None:
            self._context.term()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # --- Inside -------------------------------------------------------------------------------------------

    def _spawn(self, coroutine: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _receive(self, engine: zmq.asyncio.Socket, ready: asyncio.Future[ModelInfo]) -> None:
        try:
            while True:
                self._handle(self._decoder.decode(await engine.recv()), ready)
                # Messages that wait come without a pause. One is given, so that whoever waits for a reply has
                # taken it before the next message, which may hold outputs of the request it admits.
                await asyncio.sleep(0)
        except Exception as error:
            logger.exception("reading the engine's messages failed")
            reason = f"{type(error).__name__}: {error}"
            self._fail(InternalError(f"the engine's messages cannot be read: {reason}"))

    def _handle(self, message: wire.EngineMessage, ready: asyncio.Future[ModelInfo]) -> None:
        match message:
            case wire.Outputs():
                self._on_outputs(message.outputs)
            case wire.AdapterRetired():
                self._on_retired(message.adapter_id)
            case wire.Ready():
                if not ready.done():
                    ready.set_result(message.info)
            case wire.Failed():
                self._fail(message.error.to_exception())
            case wire.CallFailed():
                reply = self._calls.get(message.call_id)
                if reply is not None and not reply.done():
                    reply.set_exception(message.error.to_exception())
            case _:
                reply = self._calls.get(message.call_id)
                if reply is not None and not reply.done():
                    reply.set_result(message.result)

    async def _handle_end(self) -> None:
        assert self._process is not None
        how = await self._process.describe_end()
        await asyncio.sleep(LAST_MESSAGES_S)
        if self._error is None:
            logger.error("the engine's process has ended: %s", how)
        self._fail(InternalError(f"the engine's process has ended ({how}); see its log, and start it again"))

    def _fail(self, error: LoraServeError) -> None:
        if self._error is not None:
            return
        self._error = error
        for reply in self._calls.values():
            if not reply.done():
                reply.set_exception(type(error)(str(error)))
        self._calls.clear()
        self._on_failure(error)
