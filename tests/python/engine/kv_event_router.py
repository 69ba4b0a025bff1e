"""A router's view of an engine's KV cache, made of its events: it decodes them as routers do."""

from __future__ import annotations

import msgspec
import zmq

from lora_serve.engine.kv_event_messages import END_OF_REPLAY

TIMEOUT_MS = 60_000
_MASK = 2**64 - 1


class BlockStored(msgspec.Struct, array_like=True, tag=True, forbid_unknown_fields=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(msgspec.Struct, array_like=True, tag=True, forbid_unknown_fields=True):
    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, array_like=True, tag=True, forbid_unknown_fields=True):
    pass


class Batch(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


def _mix(value):
    value = (value + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 & _MASK
    return value ^ value >> 32


def page_hashes(seed, tokens, page_size):
    """The hashes of the whole pages of a sequence, as csrc/kv_prefix_cache/event_log.h defines them."""
    hashes, value = [], _mix(seed)
    for end in range(page_size, len(tokens) + 1, page_size):
        for token in tokens[end - page_size : end]:
            value = _mix(value ^ token)
        hashes.append(value)
    return hashes


class Router:
    """Subscribes, asks for what it missed, keeps what each tier holds: `pages[medium][hash]` is the event."""

    def __init__(self, endpoint, replay_endpoint, topic=b""):
        self._context = zmq.Context()
        self._live = self._context.socket(zmq.SUB)
        self._live.connect(endpoint)
        self._live.subscribe(topic)
        self._replay = self._context.socket(zmq.DEALER)
        self._replay.connect(replay_endpoint)
        self.next_sequence = 0
        self.pages = {"GPU": {}, "CPU": {}}
        self.events = []
        self.topics = set()

    def close(self):
        self._context.destroy(linger=0)

    def wait_until_subscribed(self, cause_events):
        """Call `cause_events` until a message comes by itself; what was missed before is asked for."""
        for _ in range(1200):
            cause_events()
            if self._live.poll(50):
                self.listen()
                return
        raise AssertionError("nothing was published")

    def listen(self):
        """Take one message that comes by itself, and before it what is missing."""
        assert self._live.poll(TIMEOUT_MS)
        topic, sequence, payload = self._live.recv_multipart()
        assert len(sequence) == 8
        self.topics.add(topic)
        number = int.from_bytes(sequence, "big")
        if number > self.next_sequence:
            self.catch_up()
        if number == self.next_sequence:
            self._apply(number, payload)

    def ask(self, start):
        """The batches from a number on, as they are sent again."""
        self._replay.send_multipart([b"", start.to_bytes(8, "big")])
        batches = []
        while True:
            assert self._replay.poll(TIMEOUT_MS)
            delimiter, sequence, payload = self._replay.recv_multipart()
            assert delimiter == b""
            if sequence == END_OF_REPLAY:
                assert payload == b""
                return batches
            batches.append((int.from_bytes(sequence, "big"), payload))

    def catch_up(self):
        for number, payload in self.ask(self.next_sequence):
            self._apply(number, payload)

    def _apply(self, number, payload):
        assert number >= self.next_sequence
        self.next_sequence = number + 1
        batch = msgspec.msgpack.decode(payload, type=Batch)
        assert batch.data_parallel_rank == 0
        for event in batch.events:
            self.events.append(event)
            if isinstance(event, BlockStored):
                self._store(event)
            elif isinstance(event, BlockRemoved):
                for one in event.block_hashes:
                    del self.pages[event.medium][one]  # Every page is stored before it is removed.
            else:
                self.pages = {"GPU": {}, "CPU": {}}

    def _store(self, event):
        held = self.pages[event.medium]
        assert event.parent_block_hash is None or event.parent_block_hash in held
        assert len(event.token_ids) == len(event.block_hashes) * event.block_size
        for one in event.block_hashes:
            assert one not in held
            held[one] = event
