"""The engine's own process: messages in, steps, messages out.

Run as `python -m lora_serve.engine.engine_process`; only `AsyncEngineClient` starts it. While the engine has
work, the loop takes what has arrived between two steps; without work it sleeps until a message or a finished
adapter read wakes it. The process ends with the last message (`Shutdown`, or `Failed`), and at once when the
process that started it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InternalError, LoraServeError
from lora_serve.common.log_format import format_of_environment, make_formatter
from lora_serve.common.stage_log import log_stage
from lora_serve.engine import wire
from lora_serve.engine.loop_log import LoopLogHandler
from lora_serve.engine.messages import LoadAdapterResult, UnloadAdapterResult, WireError
from lora_serve.engine.waiting_for_grammars import WaitingForGrammars

if TYPE_CHECKING:
    from lora_serve.engine.engine_core import EngineCore
    from lora_serve.engine.snapshots import AdapterListing
    from lora_serve.executor.executor import Executor

logger = logging.getLogger(__name__)

LAST_LINES_S = 1.0
"""How long the last lines of the log may take when the process ends by itself."""
STALLED_POLL_MS = 1
"""Sleep after a step that could do nothing although the scheduler has work: never a busy loop."""
LONGEST_POLL_MS = 60_000
"""Most that one sleep without work may take: poll counts in 32 bits, and deadlines may be decades away."""
SWITCH_INTERVAL_S = 1e-3
"""How long a thread that only runs Python code may hold up the loop; Python's default is 5 ms.

Not much shorter: the loop's own part of a step would then be interrupted by those that wait for the lock.
"""
FULL_COLLECTION_INTERVAL_S = 60.0
"""Between two garbage collections of everything, which happen only while the engine has no work."""
_NEVER = 2**31 - 1
ADAPTERS_A_STEP = 32
"""Of a list of all adapters so many are described between two steps: it takes a third of a millisecond."""
LINGER_MS = 2000
"""How long the last messages may take to leave."""


class EngineServer:
    """Answers the client's messages with one EngineCore, on one thread.

    Parameters
    ----------
    client : zmq.Socket
        A DEALER socket, connected to the client.
    make_core : callable
        Takes the configuration and a wake-up callable, gives the core; may take minutes.
    """

    def __init__(
        self, client: zmq.Socket[bytes], make_core: Callable[[EngineConfig, Callable[[], None]], EngineCore]
    ) -> None:
        self._client = client
        self._make_core = make_core
        self._decoder = msgspec.msgpack.Decoder(wire.ClientMessage)
        self._is_running = True
        self._waiting_for_grammars = WaitingForGrammars(self._wake)
        self._collected_at = time.monotonic()
        self._listings: deque[tuple[int, AdapterListing]] = deque()
        # Reader threads wake the loop through this pipe; a full pipe means that it is awake already.
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)

    def run(self) -> None:
        """Serve until the client says Shutdown or the engine stops."""
        start = self._decoder.decode(self._client.recv())
        if not isinstance(start, wire.Start):
            raise InternalError(f"the first message is {type(start).__name__} but must be Start")
        try:
            with log_stage(logger, "engine"):
                core = self._make_core(start.config, self._wake)
        except Exception as error:
            if not isinstance(error, LoraServeError):  # Those are the user's to mend; the client says why.
                logger.exception("the engine cannot start")
            self._send(wire.Failed(WireError.from_exception(error)))
            return
        settle_interpreter()
        core.on_retired = lambda adapter_id: self._send(wire.AdapterRetired(adapter_id))
        try:
            self._send(wire.Ready(core.model_info))
            self._loop(core)
        except Exception as error:
            logger.exception("the engine stops: its message loop failed")
            self._send(wire.Failed(WireError.from_exception(error)))
        finally:
            core.close()

    # --- The loop -----------------------------------------------------------------------------------------

    def _loop(self, core: EngineCore) -> None:
        poller = zmq.Poller()
        poller.register(self._client, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        while self._is_running:
            if self._listings:
                self._list_adapters()
            elif not core.has_work:
                self._collect_garbage()
                poller.poll(self._poll_ms(core))
            elif core.is_stalled:
                poller.poll(STALLED_POLL_MS)
            self._clear_wake_ups()
            self._take_messages(core)
            self._take_up_held(core)
            outputs = core.step()
            if outputs:
                self._send(wire.Outputs(outputs))
            if core.failure is not None:
                self._send(wire.Failed(WireError(InternalError.__name__, core.failure)))
                return

    def _collect_garbage(self) -> None:
        """Collect all of it if it is time, while nobody waits; see `settle_interpreter`."""
        now = time.monotonic()
        if now - self._collected_at >= FULL_COLLECTION_INTERVAL_S:
            gc.collect()
            self._collected_at = now

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_writer, b"\0")

    def _clear_wake_ups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_reader, 65536)

    def _send(self, message: wire.EngineMessage) -> None:
        self._client.send(wire.encode(message))

    # --- Messages -----------------------------------------------------------------------------------------

    def _take_messages(self, core: EngineCore) -> None:
        while self._is_running:
            try:
                data = self._client.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = self._decoder.decode(data)
            self._answer_or_refuse(message, partial(self._handle, core, message))

    def _answer_or_refuse(self, message: wire.ClientMessage, answer: Callable[[], None]) -> None:
        try:
            answer()
        except LoraServeError as error:
            call_id = getattr(message, "call_id", None)
            if call_id is None:
                raise
            self._send(wire.CallFailed(call_id, WireError.from_exception(error)))

    def _handle(self, core: EngineCore, message: wire.ClientMessage) -> None:
        match message:
            case wire.AddRequests():
                self._add_requests(core, message)
            case wire.AbortRequests():
                for dropped in self._waiting_for_grammars.drop(message.request_ids):
                    self._answer_or_refuse(dropped, partial(self._admit_ended, core, dropped))
                for request_id in message.request_ids:
                    core.finish_request(request_id)
            case wire.LoadAdapter():
                load = core.load_adapter(
                    message.name,
                    message.path,
                    load_inplace=message.load_inplace,
                    pinned=message.pinned,
                    weight=message.weight,
                )
                load.add_done_callback(partial(self._reply_loaded, message.call_id))
            case wire.UnloadAdapter():
                unload = core.unload_adapter(message.name, force=message.force)
                unload.add_done_callback(partial(self._reply_unloaded, message.call_id))
            case wire.GetAdapters():
                self._listings.append((message.call_id, core.list_adapters(ADAPTERS_A_STEP)))
                if len(self._listings) == 1:
                    self._list_adapters()
            case wire.GetStats():
                self._send(wire.Stats(message.call_id, self._waiting_for_grammars.count_in(core.stats())))
            case wire.Shutdown():
                self._is_running = False
            case wire.Start():
                raise InternalError("the engine was started twice")

    def _list_adapters(self) -> None:
        """Go on with the oldest list of adapters; send it when it is complete."""
        call_id, listing = self._listings[0]
        if listing.go_on():
            self._listings.popleft()
            self._send(wire.Adapters(call_id, listing.infos))

    def _add_requests(self, core: EngineCore, message: wire.AddRequests) -> None:
        held = self._waiting_for_grammars.counts
        # Before anything is compiled for them. Those without a form are as ever, unless some are held.
        if held.num_requests or message.requests[0].form is not None:
            core.admission.check_room(message.requests, held)
        self._hold_or_admit(core, message, core.now_us)

    def _hold_or_admit(self, core: EngineCore, message: wire.AddRequests, arrival_us: int) -> None:
        waits_for = core.prepare_grammars(message.requests)
        if not waits_for:
            self._send(wire.Admitted(message.call_id, core.add_requests(message.requests, arrival_us)))
            return
        self._waiting_for_grammars.add(message, waits_for, arrival_us)

    def _take_up_held(self, core: EngineCore) -> None:
        """Admit the requests whose grammars are there, and end those whose time is over."""
        for held in self._waiting_for_grammars.take_ready():
            # Held again where the grammar was forgotten for others before anybody could use it.
            again = partial(self._hold_or_admit, core, held.message, held.arrival_us)
            self._answer_or_refuse(held.message, again)
        for message in self._waiting_for_grammars.take_expired(core.now_us):
            error = WireError.from_exception(core.admission.expire(message.requests[0]))
            self._send(wire.CallFailed(message.call_id, error))

    def _poll_ms(self, core: EngineCore) -> int | None:
        """Until the next deadline of a held request, or for a while; None = a wake-up comes."""
        deadline_us = self._waiting_for_grammars.next_deadline_us
        if deadline_us is None:
            return None
        return min(LONGEST_POLL_MS, max(0, -(-(deadline_us - core.now_us) // 1000)))

    def _admit_ended(self, core: EngineCore, message: wire.AddRequests) -> None:
        """Answer a call whose requests were ended by its caller while they were held."""
        self._send(wire.Admitted(message.call_id, core.admission.resolve(message.requests[0].lora_name)))

    def _reply_loaded(self, call_id: int, load: Future[LoadAdapterResult]) -> None:
        error = load.exception()
        if error is None:
            self._send(wire.AdapterLoaded(call_id, load.result()))
        else:
            self._send(wire.CallFailed(call_id, WireError.from_exception(error)))

    def _reply_unloaded(self, call_id: int, unload: Future[UnloadAdapterResult]) -> None:
        error = unload.exception()
        if error is None:
            self._send(wire.AdapterUnloaded(call_id, unload.result()))
        else:
            self._send(wire.CallFailed(call_id, WireError.from_exception(error)))


def settle_interpreter() -> None:
    """Keep the interpreter's own pauses short, now that all that lasts is there.

    A full garbage collection visits every object with the interpreter lock held, in whichever thread happens
    to allocate, such as one that loads an adapter: 150 ms and more with torch and a model, and 50 ms for the
    layouts of some hundred adapters. So what is there now is left out from now on, and full collections are
    left to whoever knows when nobody waits.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], _NEVER)
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def _end_with_parent(parent: socket.socket) -> None:
    """Block until the other end of the pair is closed, which the system does when the parent ends."""
    parent.recv(1)
    logger.error("the process that started the engine has ended; so does the engine")
    timer = threading.Timer(LAST_LINES_S, os._exit, [1])  # Where nobody empties the pipe behind the log.
    timer.daemon = True
    timer.start()
    logging.shutdown()  # Writes it.
    os._exit(1)


def _load_factory(name: str) -> Callable[[EngineConfig], Executor]:
    module, _, function = name.partition(":")
    factory: Callable[[EngineConfig], Executor] = getattr(importlib.import_module(module), function)
    return factory


def _make_core(
    executor_factory: str | None, config: EngineConfig, on_read_done: Callable[[], None]
) -> EngineCore:
    with log_stage(logger, "modules of the engine"):  # Most of it is torch.
        from lora_serve.engine.engine_core import EngineCore

    executor = None if executor_factory is None else _load_factory(executor_factory)(config)
    core = EngineCore(config, executor, on_read_done=on_read_done)
    # Seconds, most of them imports: little beside the start on a device, much beside that on a CPU, where the
    # first request that needs it waits for it instead.
    if executor is None and core.config.is_cuda:
        with log_stage(logger, "vocabulary of grammars"):
            core.load_vocabulary()
    return core


def main(arguments: list[str] | None = None) -> None:
    """Run the process; see the module's text."""
    parser = argparse.ArgumentParser(prog="lora_serve.engine.engine_process", description=__doc__)
    parser.add_argument("--endpoint", required=True, help="ZeroMQ address of the client")
    parser.add_argument("--parent-fd", type=int, required=True, help="socket that is closed with the parent")
    parser.add_argument("--executor-factory", help="module:function that makes the executor, for tests")
    options = parser.parse_args(arguments)
    line_format = "%(asctime)s %(levelname)s engine[%(process)d] %(name)s: %(message)s"
    formatter = make_formatter(format_of_environment(), "engine", line_format)
    logging.basicConfig(level=logging.INFO, handlers=[LoopLogHandler(sys.stderr, formatter)])
    # Ctrl-C reaches the whole process group; the client decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = socket.socket(fileno=options.parent_fd)
    parent.set_inheritable(False)
    threading.Thread(target=_end_with_parent, args=[parent], daemon=True).start()

    context: zmq.Context[Any] = zmq.Context()
    client = context.socket(zmq.DEALER)
    client.set(zmq.SNDHWM, 0)
    client.set(zmq.RCVHWM, 0)
    client.set(zmq.LINGER, LINGER_MS)
    client.connect(options.endpoint)
    try:
        EngineServer(client, partial(_make_core, options.executor_factory)).run()
    finally:
        client.close()
        context.term()


if __name__ == "__main__":
    main()
