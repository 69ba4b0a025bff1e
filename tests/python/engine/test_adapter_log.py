"""What the engine's log says of an adapter's life."""

from __future__ import annotations

import logging

from .core_driver import CoreDriver


def lines_of(caplog):
    return [
        record.getMessage() for record in caplog.records if record.name == "lora_serve.engine.adapter_log"
    ]


def test_each_step_of_a_life_has_one_line(caplog):
    caplog.set_level(logging.DEBUG, "lora_serve.engine.adapter_log")
    driver = CoreDriver(lora_memory_gb=1024 / 2**30)  # Room for one.
    driver.load("a", "/a1")
    driver.files.contents["/a1"] = "new"
    driver.load("a", "/a1", load_inplace=True)
    driver.run()
    driver.load("b", "/b")
    driver.add("b")
    driver.run()
    driver.unload("b")
    driver.unload("a", force=True)
    lines = lines_of(caplog)
    assert lines[0].startswith("adapter 'a' generation 1: disk to host, rank 8, 0.0 MB, content ")
    assert [line.split(", rank")[0] for line in lines] == [
        "adapter 'a' generation 1: disk to host",
        "adapter 'a' generation 1: host to device",
        "adapter 'a' generation 1: serves",
        "adapter 'a' generation 2: disk to host",
        "adapter 'a' generation 2: serves in place of generation 1",
        "adapter 'a' generation 1: gone",
        "adapter 'b' generation 3: disk to host",
        "adapter 'b' generation 3: host to device",
        "adapter 'b' generation 3: serves",
        "adapter 'b' generation 3: drains, its requests run to their end",
        "adapter 'b' generation 3: gone",
        "adapter 'a' generation 2: drains, its requests are aborted",
        "adapter 'a' generation 2: gone",
    ]


def test_what_the_scheduler_moves_is_logged_for_debugging_only(caplog):
    caplog.set_level(logging.DEBUG, "lora_serve.engine.adapter_log")
    driver = CoreDriver(lora_memory_gb=1024 / 2**30)
    driver.load("a", "/a")
    driver.load("b", "/b")
    driver.add("b")
    driver.run()
    levels = {record.getMessage().split(": ")[1]: record.levelname for record in caplog.records}
    assert levels["off the device, to make room"] == "DEBUG"
    assert levels["host to device"] == "DEBUG"
    assert levels["serves"] == "INFO"
