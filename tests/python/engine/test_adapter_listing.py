"""Lists of many adapters are made between steps, a few adapters at a time."""

from __future__ import annotations

from .core_driver import CoreDriver

NUM_BYTES = 1024


def make_driver(num_adapters):
    driver = CoreDriver(lora_memory_gb=num_adapters * NUM_BYTES / 2**30)
    for number in range(num_adapters):
        driver.load(f"adapter-{number}", f"/adapter-{number}")
    driver.step(4)
    return driver


def test_parts_together_are_the_whole_list():
    core = make_driver(10).core
    listing = core.list_adapters(num_at_once=4)
    sizes = []
    while not listing.go_on():
        sizes.append(len(listing.infos))
    assert sizes == [4, 8]
    assert listing.infos == core.adapters()
    assert [info.adapter_id for info in listing.infos] == list(range(1, 11))


def test_a_list_without_adapters_is_complete_at_once():
    core = CoreDriver().core
    listing = core.list_adapters(num_at_once=4)
    assert listing.go_on()
    assert listing.infos == core.adapters() == []


def test_a_list_says_what_was_true_at_its_start():
    driver = make_driver(6)
    before = driver.core.adapters()
    listing = driver.core.list_adapters(num_at_once=3)
    assert not listing.go_on()
    driver.unload("adapter-4")
    driver.load("adapter-5", "/other", load_inplace=True)
    driver.load("newcomer", "/newcomer")
    driver.step(4)
    assert listing.go_on()
    assert listing.infos == before
    assert all(info.is_serving for info in listing.infos)


def test_the_wait_for_the_first_step_comes_with_the_first_token_only():
    driver = CoreDriver(max_num_seqs=1, async_scheduling=False)
    first, second = driver.add(max_tokens=3), driver.add(max_tokens=3)
    waits = {first: [], second: []}
    for _ in range(12):
        driver.seconds += driver.step_s
        for output in driver.core.step():
            waits[output.request_id].append(output.queue_us)
    assert waits[first] == [1000, None, None]
    assert waits[second] == [4000, None, None]
