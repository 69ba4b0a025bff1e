from __future__ import annotations

from lora_serve.lora.eviction_order import EvictionOrder


def leaving(order, *adapter_ids):
    """Who may go, the first one first; their last use was in the order of the arguments."""
    ranks = {adapter_id: order.rank(adapter_id, use) for use, adapter_id in enumerate(adapter_ids, 1)}
    return sorted((i for i in adapter_ids if ranks[i] is not None), key=lambda i: ranks[i])


def test_those_nobody_waits_for_go_by_their_last_use_then_the_last_in_line():
    assert leaving(EvictionOrder(), 3, 1, 2) == [3, 1, 2]
    assert leaving(EvictionOrder([4, 1, 3]), 3, 1, 2, 4, 5) == [2, 5, 3, 1, 4]


def test_nobody_goes_for_one_whose_turn_comes_later():
    assert leaving(EvictionOrder([4, 1, 3], for_adapter=1), 3, 1, 2, 4) == [2, 3, 1]
    assert leaving(EvictionOrder([4, 1, 3], for_adapter=4), 3, 2, 4) == [2, 3, 4]


def test_nobody_who_is_waited_for_goes_for_one_who_is_not():
    assert leaving(EvictionOrder([4, 1], for_adapter=9), 1, 2, 4) == [2]


def test_block_without_an_adapter_has_only_its_last_use():
    assert EvictionOrder([1]).rank(None, 7) == 7
