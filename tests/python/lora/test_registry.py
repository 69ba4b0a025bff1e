from __future__ import annotations

import dataclasses

import pytest

from lora_serve.common.errors import AdapterNotFoundError, InternalError, InvalidArgumentError
from lora_serve.lora.registry import AdapterContent, AdapterRegistry, digest_seed


def content(digest="aa"):
    return AdapterContent(path="/adapters/a", content_digest=digest, num_bytes=100, lora_rank=8)


def test_name_stands_for_nothing_until_it_is_published():
    registry = AdapterRegistry()
    generation = registry.new_generation("sql", content(), pinned=True)
    with pytest.raises(AdapterNotFoundError, match="'sql' is not loaded; load it with"):
        registry.resolve("sql")
    assert registry.names() == []
    assert registry.publish(generation) is None
    assert registry.resolve("sql") is generation
    assert registry.find("sql") is generation
    assert generation.adapter_id == 1
    assert generation.pinned
    assert (generation.path, generation.num_bytes, generation.lora_rank) == ("/adapters/a", 100, 8)


def test_reload_takes_the_name_and_keeps_the_old_generation_until_it_is_forgotten():
    registry = AdapterRegistry()
    old = registry.new_generation("sql", content("aa"))
    registry.publish(old)
    new = registry.new_generation("sql", content("bb"))
    assert registry.resolve("sql") is old
    assert registry.publish(new) is old
    assert registry.resolve("sql") is new
    assert registry.get(old.adapter_id) is old
    assert registry.generations() == [old, new]
    registry.forget(old.adapter_id)
    assert registry.generations() == [new]
    assert registry.published() == [new]


def test_retired_name_is_unknown_at_once_and_a_second_time():
    registry = AdapterRegistry()
    generation = registry.new_generation("sql", content())
    registry.publish(generation)
    assert registry.retire("sql") is generation
    for call in (registry.resolve, registry.retire):
        with pytest.raises(AdapterNotFoundError):
            call("sql")
    assert registry.find("sql") is None
    assert registry.get(generation.adapter_id) is generation


def test_numbers_are_never_reused():
    registry = AdapterRegistry()
    seen = []
    for _ in range(5):
        generation = registry.new_generation("sql", content())
        registry.publish(generation)
        registry.retire("sql")
        registry.forget(generation.adapter_id)
        seen.append(generation.adapter_id)
    failed = registry.new_generation("sql", content())
    registry.forget(failed.adapter_id)
    assert [*seen, failed.adapter_id] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(AdapterNotFoundError):
        registry.get(3)


def test_nothing_is_remembered_after_unload():
    registry = AdapterRegistry()
    generation = registry.new_generation("sql", content())
    registry.publish(generation)
    registry.retire("sql")
    registry.forget(generation.adapter_id)
    assert registry.names() == []
    assert registry.generations() == []
    with pytest.raises(AdapterNotFoundError):
        registry.forget(generation.adapter_id)


def test_names_are_independent():
    registry = AdapterRegistry()
    b = registry.new_generation("b", content())
    a = registry.new_generation("a", content())
    registry.publish(b)
    registry.publish(a)
    assert registry.names() == ["a", "b"]
    assert registry.published() == [a, b]
    registry.retire("a")
    assert registry.resolve("b") is b


def test_older_generation_never_takes_the_name_back():
    registry = AdapterRegistry()
    old = registry.new_generation("sql", content("aa"))
    new = registry.new_generation("sql", content("bb"))
    registry.publish(new)
    with pytest.raises(InternalError, match="expected one older"):
        registry.publish(old)
    assert registry.resolve("sql") is new


def test_forgotten_and_foreign_generations_cannot_be_published():
    registry = AdapterRegistry()
    generation = registry.new_generation("sql", content())
    registry.forget(generation.adapter_id)
    with pytest.raises(InternalError, match="does not hold it"):
        registry.publish(generation)
    with pytest.raises(InternalError, match="does not hold it"):
        AdapterRegistry().publish(generation)


def test_generation_in_use_by_its_name_cannot_be_forgotten():
    registry = AdapterRegistry()
    generation = registry.new_generation("sql", content())
    registry.publish(generation)
    with pytest.raises(InternalError, match="retire the name first"):
        registry.forget(generation.adapter_id)
    assert registry.resolve("sql") is generation


def test_pin_changes_and_nothing_else_of_the_generation_does():
    registry = AdapterRegistry()
    old = registry.new_generation("sql", content("aa"))
    registry.publish(old)
    pinned = registry.set_sharing(old.adapter_id, pinned=True, weight=1.0)
    assert pinned == dataclasses.replace(old, pinned=True)
    assert not old.pinned
    assert registry.find("sql") is registry.get(old.adapter_id) is registry.generations()[0] is pinned
    assert registry.set_sharing(old.adapter_id, pinned=True, weight=1.0) is pinned
    assert registry.retire("sql") is pinned
    registry.forget(old.adapter_id)
    with pytest.raises(AdapterNotFoundError):
        registry.set_sharing(old.adapter_id, pinned=False, weight=1.0)


def test_pin_of_a_generation_without_the_name_does_not_give_it_the_name():
    registry = AdapterRegistry()
    old = registry.new_generation("sql", content("aa"))
    registry.publish(old)
    new = registry.new_generation("sql", content("bb"))
    assert registry.set_sharing(new.adapter_id, pinned=True, weight=1.0).pinned
    assert registry.find("sql") is old
    assert registry.publish(registry.get(new.adapter_id)) is old
    assert registry.set_sharing(old.adapter_id, pinned=True, weight=1.0).pinned
    assert registry.find("sql") is registry.get(new.adapter_id)


def test_generation_is_immutable():
    generation = AdapterRegistry().new_generation("sql", content())
    with pytest.raises(dataclasses.FrozenInstanceError):
        generation.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["", " sql", "sql ", "a\nb", "a\x00b", "\ud800", "x" * 257])
def test_bad_names_are_refused(name):
    registry = AdapterRegistry()
    with pytest.raises(InvalidArgumentError, match="lora_name is"):
        registry.new_generation(name, content())
    assert registry.generations() == []


@pytest.mark.parametrize("name", ["sql-v2", "org/team:adapter", "größe", "模型", "a b", "x" * 256])
def test_usual_names_are_accepted(name):
    assert AdapterRegistry().new_generation(name, content()).name == name


def test_digest_seed_depends_on_name_and_content_unambiguously():
    pairs = [("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"), ("a", "bd"), ("b", "bc")]
    seeds = [digest_seed(name, digest) for name, digest in pairs]
    assert len(set(seeds)) == len(pairs)
    assert all(0 < seed < 2**64 for seed in seeds)


def test_digest_seed_is_the_same_in_every_process():
    assert digest_seed("sql", "00ff") == 15097671418768583854


def test_generations_of_one_content_under_one_name_share_the_seed_but_not_the_number():
    registry = AdapterRegistry()
    first, second = (registry.new_generation("sql", content("aa")) for _ in range(2))
    assert first.digest_seed == second.digest_seed == digest_seed("sql", "aa")
    assert first.adapter_id != second.adapter_id
