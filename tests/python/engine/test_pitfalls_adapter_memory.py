"""Failures of other engines around adapter memory that need an engine to show (the list: lora/README.md)."""

from __future__ import annotations

import pytest

from .core_driver import CoreDriver

pytestmark = pytest.mark.usefixtures("async_scheduling")
NUM_BYTES = 1024
"""Of each adapter."""


def test_third_adapter_takes_nobodys_place_in_a_batch_of_a_b_c_a_on_two_places():
    """25: the last request of A ran as the base model. The oracle refuses rows of another adapter's slot."""
    driver = CoreDriver(lora_memory_gb=2 * NUM_BYTES / 2**30, max_loras=2)
    for name in "abc":
        driver.load(name, f"/{name}")
    requests = [driver.add(name, prompt=list(range(9))) for name in "abca"]
    assert [driver.adapter_id_of(request) for request in requests] == [1, 2, 3, 1]
    driver.run()
    driver.assert_complete(*requests)


def test_requests_after_a_replacement_in_place_do_not_read_the_files_again():
    """32: the flag stayed with the adapter, and every request read it from disk."""
    driver = CoreDriver()
    driver.load("a", "/v1")
    driver.load("a", "/v2", load_inplace=True)
    num_reads = driver.files.num_reads
    requests = [driver.add("a", prompt=[index, *range(9)]) for index in range(5)]
    driver.run()
    driver.assert_complete(*requests)
    assert driver.files.num_reads == num_reads == 2


def test_load_goes_on_while_its_victims_requests_run():
    """37: a load waited for the requests of whom it replaced, under the lock that all loads need."""
    driver = CoreDriver(lora_memory_gb=NUM_BYTES / 2**30, adapter_time_slice_steps=0)
    driver.load("a", "/a")
    running = driver.add("a", max_tokens=40)
    driver.step(3)
    for name in "bc":  # No room for either while A's request runs.
        assert not driver.load(name, f"/{name}").already_loaded
    assert running not in driver.finish
    driver.run()
    driver.assert_complete(running)
