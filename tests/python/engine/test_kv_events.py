from __future__ import annotations

import json
import random
import threading
import time

import msgspec
import pytest
import zmq

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.kv_events_config import KVEventsConfig, parse_kv_events_config
from lora_serve.engine.isolation import make_domain
from lora_serve.engine.kv_event_publisher import KVEventPublisher

from .core_driver import CoreDriver
from .kv_event_router import AllBlocksCleared, BlockRemoved, BlockStored, Router, page_hashes

PAGE_SIZE = 4


class Setup:
    """An engine that publishes, and a router."""

    def __init__(self, folder, *, num_host_pages=0, topic="", driver_options=None, **options):
        self.config = KVEventsConfig(
            enable_kv_cache_events=True,
            endpoint=f"ipc://{folder}/events",
            replay_endpoint=f"ipc://{folder}/replay",
            topic=topic,
            **options,
        )
        if num_host_pages:
            driver_options = {"num_host_pages": num_host_pages, **(driver_options or {})}
        self.driver = CoreDriver(kv_events_config=self.config, page_size=PAGE_SIZE, **(driver_options or {}))
        self.router = Router(self.config.endpoint, self.config.replay_endpoint, topic.encode())

    @property
    def publisher(self):
        return self.driver.core._kv_events

    def run(self, *prompts, lora_name=None, **params):
        for prompt in prompts:
            self.driver.add(lora_name, prompt, **params)
        self.driver.run()

    def catch_up(self):
        """Until the router knows what the engine has said."""
        deadline = time.monotonic() + 60
        while self.router.next_sequence < self.publisher.num_batches:
            assert time.monotonic() < deadline
            self.router.catch_up()

    def close(self):
        self.router.close()
        self.driver.core.close()


@pytest.fixture
def make(tmp_path):
    made = []

    def make_one(**options):
        made.append(Setup(tmp_path, **options))
        return made[-1]

    yield make_one
    for one in made:
        one.close()


def digest_seed_of(setup, name):
    if name is None:
        return 0
    return setup.driver.core._registry.resolve(name).digest_seed


@pytest.mark.parametrize("lora_name", [None, "sql"])
def test_stored_pages_tell_tokens_hashes_parents_and_the_adapter(make, lora_name):
    setup = make()
    setup.driver.load("sql", "/sql")
    prompt = list(range(100, 111))
    setup.run(prompt, lora_name=lora_name, max_tokens=3)
    setup.catch_up()
    first, *events = setup.router.events
    assert isinstance(first, AllBlocksCleared)
    tokens = prompt + setup.driver.outputs[0]
    hashes = page_hashes(digest_seed_of(setup, lora_name), tokens[: len(tokens) - 1], PAGE_SIZE)
    assert len(hashes) == 3
    found = [one for event in events for one in event.block_hashes]
    assert found == hashes
    assert [token for event in events for token in event.token_ids] == tokens[:12]
    assert events[0].parent_block_hash is None
    for event in events[1:]:
        assert event.parent_block_hash == hashes[hashes.index(event.block_hashes[0]) - 1]
    for event in events:
        assert isinstance(event, BlockStored)
        assert (event.lora_name, event.medium, event.block_size) == (lora_name, "GPU", PAGE_SIZE)
        assert event.lora_id == (None if lora_name is None else 1)


def test_the_same_tokens_have_other_hashes_under_each_adapter(make):
    setup = make()
    for name in ("sql", "law"):
        setup.driver.load(name, f"/{name}")
    for name in (None, "sql", "law"):
        setup.run(list(range(8)), lora_name=name, max_tokens=1)
    setup.catch_up()
    by_name = {}
    for one, event in setup.router.pages["GPU"].items():
        by_name.setdefault(event.lora_name, set()).add(one)
    assert {name: len(hashes) for name, hashes in by_name.items()} == {None: 2, "sql": 2, "law": 2}
    assert len(set.union(*by_name.values())) == 6


@pytest.mark.parametrize("num_host_pages", [0, 32])
@pytest.mark.parametrize("lora_name", [None, "sql"])
def test_pages_that_only_one_isolation_domain_can_use_are_not_published(make, lora_name, num_host_pages):
    setup = make(num_host_pages=num_host_pages, driver_options={"num_device_pages": 16})
    setup.driver.load("sql", "/sql")
    domain = make_domain("group", "salt")
    secret, public = list(range(8)), list(range(100, 108))
    for begin in range(0, 80, 8):  # More than there is room for: pages leave as well.
        setup.run([begin + token for token in secret], lora_name=lora_name, domain=domain, max_tokens=1)
    setup.run(public, lora_name=lora_name, max_tokens=1)
    setup.driver.unload("sql")
    setup.driver.step(2)
    setup.catch_up()
    stored = [event for event in setup.router.events if isinstance(event, BlockStored)]
    assert {token for event in stored for token in event.token_ids} == set(public)


def test_unloading_removes_the_pages_of_that_adapter_only(make):
    setup = make()
    setup.driver.load("sql", "/sql")
    setup.run(list(range(8)), lora_name="sql", max_tokens=1)
    setup.run(list(range(8)), max_tokens=1)
    setup.driver.unload("sql")
    setup.driver.step(2)
    setup.catch_up()
    assert {event.lora_name for event in setup.router.pages["GPU"].values()} == {None}
    removed = [event for event in setup.router.events if isinstance(event, BlockRemoved)]
    assert sum(len(event.block_hashes) for event in removed) == 2
    assert {event.medium for event in removed} == {"GPU"}


def test_messages_come_by_themselves_under_their_topic(make):
    setup = make(topic="kv@pod-1@tiny")
    numbers = iter(range(1000, 100_000, 8))
    setup.router.wait_until_subscribed(
        lambda: setup.run(list(range(start := next(numbers), start + 8)), max_tokens=1)
    )
    setup.run(list(range(8)), max_tokens=1)
    last = setup.publisher.num_batches - 1
    while setup.router.next_sequence <= last:
        setup.router.listen()
    assert setup.router.topics == {b"kv@pod-1@tiny"}
    assert set(page_hashes(0, list(range(8)), PAGE_SIZE)) <= setup.router.pages["GPU"].keys()


@pytest.mark.parametrize("num_host_pages", [0, 32])
def test_a_router_that_hears_everything_knows_what_is_cached(make, num_host_pages):
    setup = make(num_host_pages=num_host_pages, driver_options={"num_device_pages": 24, "max_num_seqs": 4})
    driver, choose = setup.driver, random.Random(8)
    for name in ("sql", "law"):
        driver.load(name, f"/{name}")
    for _ in range(60):
        prompt = [choose.randrange(3) for _ in range(choose.randrange(1, 40))]
        driver.add(choose.choice([None, "sql", "law"]), prompt, max_tokens=choose.randrange(1, 12))
        driver.step(choose.randrange(6))
    driver.unload("law")
    driver.run()
    driver.step(8)
    setup.catch_up()
    stats = driver.core.stats()
    assert stats.total_evicted_pages > 0
    assert len(setup.router.pages["GPU"]) == stats.num_tree_pages
    assert len(setup.router.pages["CPU"]) == stats.num_host_pages - stats.num_free_host_pages
    assert bool(setup.router.pages["CPU"]) == bool(num_host_pages)
    assert {event.lora_name for held in setup.router.pages.values() for event in held.values()} <= {
        None,
        "sql",
    }


def test_missed_batches_are_sent_again_as_far_as_they_are_kept(make):
    setup = make(buffer_steps=3)
    for start in range(0, 80, 8):
        setup.run(list(range(start, start + 8)), max_tokens=1)
    newest = setup.publisher.num_batches - 1
    deadline = time.monotonic() + 60
    while [number for number, _ in setup.router.ask(0)] != [newest - 2, newest - 1, newest]:
        assert time.monotonic() < deadline
    assert [number for number, _ in setup.router.ask(newest)] == [newest]
    assert setup.router.ask(newest + 1) == []


def test_a_req_socket_gets_the_first_batch(make):
    setup = make()
    with zmq.Context() as context, context.socket(zmq.REQ) as peer:
        peer.linger = 0
        peer.connect(setup.config.replay_endpoint)
        peer.send((0).to_bytes(8, "big"))
        assert peer.poll(60_000)
        sequence, payload = peer.recv_multipart()
    assert sequence == bytes(8)
    assert msgspec.msgpack.decode(payload)[1] == [["AllBlocksCleared"]]


def test_requests_that_make_no_sense_harm_nobody(make):
    setup = make()
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        peer.connect(setup.config.replay_endpoint)
        for frames in ([b""], [b"", b"x"], [b"", b"9" * 100_000], [b"a", b"b", b"c"]):
            peer.send_multipart(frames)
        assert not peer.poll(100)
    setup.catch_up()
    assert isinstance(setup.router.events[0], AllBlocksCleared)


def test_a_full_queue_drops_and_leaves_a_gap(make, monkeypatch):
    is_free, send = threading.Event(), KVEventPublisher._send

    def send_when_free(self, batch):
        assert is_free.wait(60)
        send(self, batch)

    monkeypatch.setattr(KVEventPublisher, "_send", send_when_free)
    setup = make(max_queue_size=3)
    while setup.publisher._queue.qsize():  # The thread has taken the first batch, and holds it.
        time.sleep(0.001)
    for start in range(0, 80, 8):
        setup.run(list(range(start, start + 8)), max_tokens=1)
    num_batches, num_dropped = setup.publisher.num_batches, setup.publisher.num_dropped_batches
    stats = setup.driver.core.stats()
    assert (stats.total_kv_event_batches, stats.total_dropped_kv_event_batches) == (num_batches, num_dropped)
    assert num_dropped == num_batches - 4  # One with the thread, three in the queue.
    is_free.set()
    while setup.publisher._queue.qsize():
        time.sleep(0.01)
    setup.run(list(range(200, 208)), max_tokens=1)
    deadline = time.monotonic() + 60
    while (numbers := [number for number, _ in setup.router.ask(0)])[-1] != setup.publisher.num_batches - 1:
        assert time.monotonic() < deadline
    assert numbers == [0, 1, 2, 3, *range(num_batches, setup.publisher.num_batches)]


def test_peers_that_go_away_do_not_matter(make):
    setup = make(hwm=1)
    context = zmq.Context()
    for _ in range(3):
        gone = Router(setup.config.endpoint, setup.config.replay_endpoint)
        gone._replay.send_multipart([b"", bytes(8)])
        gone.close()
    slow = context.socket(zmq.SUB)
    slow.set_hwm(1)
    slow.connect(setup.config.endpoint)
    slow.subscribe(b"")
    for start in range(0, 400, 8):
        setup.run(list(range(start, start + 8)), max_tokens=1)
    assert setup.driver.core.failure is None
    assert len(setup.driver.outputs) == 50
    setup.catch_up()
    context.destroy(linger=0)
    setup.driver.core.close()  # Returns although a subscriber has taken nothing.


def test_events_can_be_maps(make):
    setup = make(event_encoding="map")
    setup.driver.load("sql", "/sql")
    setup.run(list(range(4)), lora_name="sql", max_tokens=1)
    setup.driver.unload("sql")
    setup.driver.step(2)
    deadline = time.monotonic() + 60
    while len(batches := setup.router.ask(0)) < setup.publisher.num_batches:
        assert time.monotonic() < deadline
    events = [event for _, payload in batches for event in msgspec.msgpack.decode(payload)[1]]
    [one] = events[1]["block_hashes"]
    assert events == [
        {"type": "AllBlocksCleared"},
        {
            "type": "BlockStored",
            "block_hashes": [one],
            "parent_block_hash": None,
            "token_ids": [0, 1, 2, 3],
            "block_size": PAGE_SIZE,
            "lora_id": 1,
            "medium": "GPU",
            "lora_name": "sql",
        },
        {"type": "BlockRemoved", "block_hashes": [one], "medium": "GPU"},
    ]


@pytest.mark.parametrize(
    "config", [None, KVEventsConfig(), KVEventsConfig(enable_kv_cache_events=True, publisher="null")]
)
def test_without_events_nothing_is_kept_and_no_thread_runs(config):
    driver = CoreDriver(kv_events_config=config)
    driver.add()
    driver.run()
    assert driver.core._kv_events is None
    assert driver.core._scheduler.take_events() == []
    assert not [thread for thread in threading.enumerate() if "kv" in thread.name]


def test_an_address_that_cannot_be_used_is_refused():
    config = KVEventsConfig(enable_kv_cache_events=True, endpoint="ipc:///no/such/folder/socket")
    with pytest.raises(InvalidArgumentError, match="endpoint 'ipc:///no/such/folder/socket' cannot be used"):
        KVEventPublisher(config, PAGE_SIZE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON such as"),
        ("[]", "expected JSON such as"),
        ('{"enabled": true}', "enabled"),
        ('{"publisher": "kafka"}', "one of zmq, null"),
        ('{"endpoint": "5557"}', "a ZeroMQ address"),
        ('{"replay_endpoint": "5557"}', "a ZeroMQ address"),
        ('{"buffer_steps": 0}', "buffer_steps is 0"),
        ('{"hwm": -1}', "hwm is -1"),
        ('{"max_queue_size": 0}', "max_queue_size is 0"),
        ('{"event_encoding": "json"}', "one of array, map"),
    ],
)
def test_a_wrong_configuration_is_refused(text, message):
    with pytest.raises(InvalidArgumentError, match=message):
        parse_kv_events_config(text)


def test_vllms_json_is_taken():
    fields = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://*:5557",
        "replay_endpoint": "tcp://*:5558",
        "buffer_steps": 10,
        "hwm": 20,
        "max_queue_size": 30,
        "topic": "kv@pod@model",
    }
    config = parse_kv_events_config(json.dumps(fields))
    assert config.is_on
    assert {name: getattr(config, name) for name in fields} == fields


def test_events_without_prefix_caching_are_refused():
    config = KVEventsConfig(enable_kv_cache_events=True)
    with pytest.raises(InvalidArgumentError, match="--no-prefix-caching"):
        EngineConfig(model="m", enable_prefix_caching=False, kv_events_config=config)
