"""Many clients load, replace, pin, unload and use 64 adapters over HTTP, at random and all at once.

There is room for 6 of them on the device and for 12 on the host. Every answer is that of transformers + peft
for the generation that it names; every status is one that the life cycle allows in some order of the calls
(`support/life_cycle/history.py`); nothing hangs; in the end nothing is left.

LORA_SERVE_TEST_SECONDS: how long the clients act. LORA_SERVE_TEST_SEED: repeats a run's random numbers, not
the moments at which calls meet.
"""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from support.life_cycle.catalogue import PROMPTS, Catalogue, make_catalogue
from support.life_cycle.clients import HANG_S, RandomClient, run_clients
from support.life_cycle.faults import FAULTS
from support.life_cycle.server import FuzzServer, make_server
from support.life_cycle.world import World

SECONDS = float(os.environ.get("LORA_SERVE_TEST_SECONDS", "60"))
SEED = int(os.environ.get("LORA_SERVE_TEST_SEED", str(random.SystemRandom().randrange(2**31))))
NUM_CLIENTS = 8
MUST_BE_MET = ("loaded", "already", "conflict", "unloaded", "not_found", "served", "missing", "left")
MOST_MORE = 2
"""How often the clients act as long again at most, where something was not met."""
CATALOGUE_SEED = 3


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return make_catalogue(tmp_path_factory.mktemp("life-cycle"), CATALOGUE_SEED)


class Fuzz:
    """One run against one server."""

    def __init__(self, catalogue: Catalogue, server: FuzzServer, seed: int) -> None:
        print(f"LORA_SERVE_TEST_SEED={seed}")
        self._server = server
        self._seed = seed
        self.world = World(catalogue, server.device_bytes)

    def run(self, seconds: float) -> None:
        """Every content once, one client a name; then everything at random; then nothing is left."""
        with self._http() as http:
            self._http_client = RandomClient(self.world, http, "first")
            self._ask_base()
            start = self._server.memory()
            self._learn()
            if self.world.problems:
                return  # What is not known of every content cannot be checked.
            for part in range(1 + MOST_MORE):
                if self.world.problems or (part and not self.find_unmet(seconds)):
                    break
                run_clients(self.world, self._http, NUM_CLIENTS, seconds, f"{self._seed}-{part}")
            self.world.check()
            if not self.world.problems:
                self._check_nothing_is_left(http, start)

    def find_unmet(self, seconds: float) -> set[str]:
        """What the clients should have met in so many seconds, and have not; a slow machine takes longer."""
        counts = self.world.counts
        unmet = {kind for kind in MUST_BE_MET if not counts[kind]}
        return unmet | ({"enough answers"} if counts["ended: length"] <= 10 * seconds else set())

    def _http(self, timeout_s: float = HANG_S) -> httpx.Client:
        return httpx.Client(base_url=self._server.url, trust_env=False, timeout=timeout_s)

    def _ask_base(self) -> None:
        for prompt in range(len(PROMPTS)):
            self._http_client.ask([None], [prompt], 4)

    def _learn(self) -> None:
        """Load every content alone under its name: which digest it has, and that its answers are right."""

        def learn(number: int) -> None:
            with self._http() as http:
                client = RandomClient(self.world, http, f"learn {number}")
                for name in self.world.catalogue.names[number::NUM_CLIENTS]:
                    for version, content in enumerate(name.contents):
                        adapter_id = client.load_content(name, version, inplace=True, pinned=False)
                        if adapter_id is None:
                            return
                        listed = http.get("/v1/loras").json()["data"]
                        [loaded] = [one for one in listed if one["adapter_id"] == adapter_id]
                        digest = loaded["content_digest"][:8]
                        label = self.world.label_of_digest.setdefault(digest, content.label)
                        self.world.num_bytes_of[label] = loaded["num_bytes"]
                        assert label == content.label, f"{label} and {content.label} have the same digest"
                        prompt = (number + version) % len(PROMPTS)
                        [part] = client.ask([name.name], [prompt], 6)
                        if self.world.problems:
                            return
                        assert part.adapter_id == adapter_id

        with ThreadPoolExecutor(NUM_CLIENTS) as threads:
            list(threads.map(learn, range(NUM_CLIENTS)))
        self._http_client.list()

    def _check_nothing_is_left(self, http: httpx.Client, start: dict[str, object]) -> None:
        totals = http.get("/v1/loras").json()["stats"]
        self.totals = {key: count for key, count in totals.items() if key.startswith("total_")}
        for name in {adapter["name"] for adapter in http.get("/v1/loras").json()["data"]}:
            unloaded = http.post("/v1/unload_lora_adapter", json={"lora_name": name})
            if unloaded.status_code not in (200, 404):
                self.world.fail(f"{name} cannot be unloaded: {unloaded.status_code} {unloaded.text}")
        end = self._server.memory_when(start)
        for what, count in start.items():
            if end[what] != count:
                self.world.fail(f"{what}: {end[what]}, at the start {count}")
        loras = http.get("/v1/loras").json()
        if loras["data"] or any(tier["num_bytes"] for tier in loras["tiers"].values()):
            self.world.fail(f"listed when all are unloaded: {loras}")


def fuzz(catalogue: Catalogue, seconds: float, seed: int, fault: str = "") -> Fuzz:
    for name in catalogue.names:  # Times before this run mean nothing to it.
        name.writes[:] = [(0.0, 0.0, written) for *_, written in name.writes[-1:]]
    with make_server(catalogue, fault) as server:
        fuzz = Fuzz(catalogue, server, seed)
        fuzz.world.looks_at_ids = fault != "reload_keeps_the_kv_namespace"
        fuzz.run(seconds)
        print(fuzz.world.describe())
        if fuzz.world.problems and not fault:
            print(server.log())
    return fuzz


def check_run(run: Fuzz, seconds: float) -> None:
    assert run.world.problems == []
    # The run was worth its name: all that it is for was met.
    totals = run.totals
    print(totals)
    assert run.find_unmet(seconds) == set()
    busy = ("total_adapter_evictions", "total_hit_tokens", "total_evicted_pages", "total_host_hit_tokens")
    assert {count for count in busy if not totals[count]} == set()


@pytest.mark.timeout(600)
def test_life_cycle_fuzz(catalogue: Catalogue) -> None:
    check_run(fuzz(catalogue, SECONDS, SEED), SECONDS)


# Problems of which one must be among those that the fuzz finds, and seconds that suffice for it.
FOUND = {
    "reload_keeps_the_kv_namespace": ("wrong answer", 90),
    "leased_block_is_evicted": ("wrong answer", 90),
    "slot_is_not_rewritten": ("wrong answer", 10),
    "moved_adapter_is_not_rewritten": ("wrong answer", 30),
    "unload_keeps_host_memory": ("host pool", 5),
    "unload_keeps_device_memory": ("could not be brought to the device", 10),
    "unload_does_not_wait": ("are left", 60),
    "read_again_without_a_look_at_the_digest": ("wrong answer", 90),
    "load_in_place_needs_no_flag": ("no order", 10),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(catalogue: Catalogue, fault: str) -> None:
    words, seconds = FOUND[fault]
    begin = time.monotonic()
    run = fuzz(catalogue, seconds, SEED, fault)
    print(fault, f"{time.monotonic() - begin:.0f} s", [problem[:300] for problem in run.world.problems])
    assert any(words in problem for problem in run.world.problems), run.world.problems


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_life_cycle_fuzz_for_minutes(catalogue: Catalogue) -> None:
    run = fuzz(catalogue, max(SECONDS, 300.0), SEED)
    check_run(run, max(SECONDS, 300.0))
    rare = ("cancelled", "refused", "broken", "ended: abort")
    assert {kind for kind in rare if not run.world.counts[kind]} == set()
