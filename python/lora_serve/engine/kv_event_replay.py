"""Sends batches of KV events again to whoever has missed them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from typing import Any

import zmq

from lora_serve.engine.kv_event_messages import END_OF_REPLAY, sequence_frame

logger = logging.getLogger(__name__)

BATCHES_AT_ONCE = 16
"""Sent before the step loop is let at the interpreter lock again."""
PAUSE_S = 0.5e-3


class ReplayBuffer:
    """The newest batches, in order; for several threads.

    Parameters
    ----------
    num_batches : int
        Most that are kept.
    """

    def __init__(self, num_batches: int) -> None:
        self._lock = threading.Lock()
        self._batches: deque[tuple[int, bytes]] = deque(maxlen=num_batches)

    def add(self, sequence: int, payload: bytes) -> None:
        """Keep a batch; the oldest goes when there is no room."""
        with self._lock:
            self._batches.append((sequence, payload))

    def since(self, sequence: int) -> list[tuple[int, bytes]]:
        """Give the batches from this sequence number on."""
        with self._lock:
            return [batch for batch in self._batches if batch[0] >= sequence]


class ReplayServer:
    """Answers a sequence number with every batch from there on, then END_OF_REPLAY, on a thread of its own.

    Nobody is waited for: what a peer does not take is dropped.

    Owns: the socket, from `start` on, and the thread.

    Parameters
    ----------
    socket : zmq.Socket
        A ROUTER socket that is bound.
    buffer : ReplayBuffer
        What can be sent again.
    """

    def __init__(self, socket: zmq.Socket[bytes], buffer: ReplayBuffer) -> None:
        self._socket = socket
        self._buffer = buffer
        self._wake_reader, self._wake_writer = os.pipe()
        self._thread = threading.Thread(target=self._run, name="lora-serve-kv-replay", daemon=True)
        self._is_closing = False

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and the socket."""
        self._is_closing = True
        os.write(self._wake_writer, b"\0")
        self._thread.join()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        while not self._is_closing:
            try:
                ready: dict[Any, int] = dict(poller.poll())
                if self._socket in ready:
                    self._answer(self._socket.recv_multipart())
            except Exception:
                logger.exception("a replay of KV events failed")
                time.sleep(PAUSE_S)
        self._socket.close(linger=0)

    def _answer(self, request: list[bytes]) -> None:
        # The peer's identity, an empty frame where a REQ socket put one, and the number.
        *envelope, start = request
        if len(start) != 8:
            logger.info("a request for a replay of KV events has %d bytes but must have 8", len(start))
            return
        batches = self._buffer.since(int.from_bytes(start, "big"))
        for number, (sequence, payload) in enumerate(batches, 1):
            self._send([*envelope, sequence_frame(sequence), payload])
            if number % BATCHES_AT_ONCE == 0:
                time.sleep(PAUSE_S)
            if self._is_closing:
                return
        self._send([*envelope, END_OF_REPLAY, b""])

    def _send(self, frames: list[bytes]) -> None:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            logger.debug("a peer does not take the KV events that it asked for")
