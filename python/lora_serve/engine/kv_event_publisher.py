"""Publishes what comes to the KV cache and leaves it, for routers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import zmq

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.kv_events_config import KVEventsConfig
from lora_serve.engine.kv_event_messages import BatchEncoder, NamedEvent, sequence_frame
from lora_serve.engine.kv_event_replay import ReplayBuffer, ReplayServer

logger = logging.getLogger(__name__)

LINGER_MS = 500
"""How long the last batches may take to leave."""
REPLAY_HEADROOM = 1000
"""Messages for one peer beyond one whole replay; then the peer loses some."""
_BOUND = ("*", "::", "ipc://", "inproc://")


@dataclass(frozen=True)
class _Batch:
    """`events` is None in the batch that says that nothing is cached."""

    sequence: int
    time_s: float
    events: Sequence[NamedEvent] | None


class KVEventPublisher:
    """Numbers batches of events and leaves them to a thread, which encodes and sends them.

    `publish` never waits, whoever listens or does not: a full queue drops the batch, whose number is then
    missing in what subscribers get. The first batch says that nothing is cached, because routers may remember
    what an earlier process had.

    Owns: its ZeroMQ context, the sockets and the threads.

    Parameters
    ----------
    config : KVEventsConfig
        Where to publish, and how much is kept.
    page_size : int
        Tokens of a page.
    clock_s : callable
        Gives Unix time.

    Raises
    ------
    InvalidArgumentError
        An address cannot be used.

    Attributes
    ----------
    num_batches : int
        Batches so far, dropped ones included; also the next one's number.
    num_dropped_batches : int
        Those that found the queue full.
    """

    def __init__(
        self, config: KVEventsConfig, page_size: int, *, clock_s: Callable[[], float] = time.time
    ) -> None:
        self._config = config
        self._clock_s = clock_s
        self.num_batches = 0
        self.num_dropped_batches = 0
        self._encoder = BatchEncoder(page_size, as_maps=config.event_encoding == "map")
        self._topic = config.topic.encode()
        self._buffer = ReplayBuffer(config.buffer_steps)
        # Putting into a SimpleQueue keeps the interpreter lock; a write to a pipe or a socket lets go of it.
        self._queue: SimpleQueue[_Batch | None] = SimpleQueue()
        self._context: zmq.Context[Any] = zmq.Context()
        self._replay: ReplayServer | None = None
        try:
            self._socket = self._open(zmq.PUB, "endpoint", config.endpoint, config.hwm)
            if config.replay_endpoint is not None:
                # All that can be sent again fits in, so that whoever takes it gets the end too.
                hwm = config.buffer_steps + REPLAY_HEADROOM
                router = self._open(zmq.ROUTER, "replay_endpoint", config.replay_endpoint, hwm)
                self._replay = ReplayServer(router, self._buffer)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, name="lora-serve-kv-events", daemon=True
        )
        self._put(None)
        self._thread.start()
        if self._replay is not None:
            self._replay.start()

    def publish(self, events: Sequence[NamedEvent]) -> None:
        """Leave a batch to the thread."""
        self._put(events)

    def close(self) -> None:
        """Send what waits, and end the threads and the sockets. Closing twice changes nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._queue.put(None)
        thread.join()
        if self._replay is not None:
            self._replay.close()
        self._context.term()

    def _put(self, events: Sequence[NamedEvent] | None) -> None:
        sequence = self.num_batches
        self.num_batches += 1
        if self._queue.qsize() >= self._config.max_queue_size:
            self.num_dropped_batches += 1
            if self.num_dropped_batches == 1:
                logger.warning("KV events are dropped: %d batches wait already", self._queue.qsize())
            return
        self._queue.put(_Batch(sequence, self._clock_s(), events))

    def _open(self, kind: int, field: str, address: str, hwm: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.set_hwm(hwm)
        socket.set(zmq.LINGER, LINGER_MS)
        try:
            if kind == zmq.ROUTER or any(part in address for part in _BOUND):
                socket.bind(address)
            else:
                socket.connect(address)
        except zmq.ZMQError as error:
            raise InvalidArgumentError(
                f"--kv-events-config: {field} {address!r} cannot be used: {error}; choose another one"
            ) from None
        return socket

    def _run(self) -> None:
        while True:
            batch = self._queue.get()
            if batch is None:
                break
            try:
                self._send(batch)
            except Exception:  # The number of this batch is missing then.
                logger.exception("a batch of KV events could not be sent")
        self._socket.close()

    def _send(self, batch: _Batch) -> None:
        if batch.events is None:
            payload = self._encoder.encode_cleared(batch.time_s)
        else:
            payload = self._encoder.encode(batch.time_s, batch.events)
        self._buffer.add(batch.sequence, payload)
        # A PUB socket never blocks: it leaves out subscribers that do not take their messages.
        self._socket.send_multipart([self._topic, sequence_frame(batch.sequence), payload])
