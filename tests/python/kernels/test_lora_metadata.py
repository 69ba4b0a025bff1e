from __future__ import annotations

import pytest
import torch

from lora_serve.kernels import build_lora_metadata


def test_groups_interleaved_tokens_by_slot_in_stable_order():
    metadata = build_lora_metadata(torch.tensor([3, -1, 0, 3, -1, 7], dtype=torch.int32), max_loras=4)

    assert metadata.token_lora_mapping.tolist() == [3, -1, 0, 3, -1, 7]
    assert metadata.token_indices_sorted_by_lora_ids.tolist() == [1, 4, 2, 0, 3, 5]
    assert metadata.active_lora_ids.tolist() == [-1, 0, 3, 7, -1]
    assert metadata.num_tokens_per_lora.tolist() == [2, 1, 2, 1, 0]
    assert metadata.lora_token_start_loc.tolist() == [0, 2, 3, 5, 6, 6]
    assert not metadata.no_adapter


def test_groups_are_the_tokens_with_an_adapter_sorted_and_padded_with_the_first_of_each():
    groups = build_lora_metadata(torch.tensor([3, -1, 0, 3, -1, 7], dtype=torch.int32), max_loras=4).groups
    assert (groups.slots.tolist(), groups.counts.tolist(), groups.max_count) == ([0, 3, 7], [1, 2, 1], 2)
    assert groups.tokens.tolist() == [2, 0, 3, 5]
    assert groups.group_of_token.tolist() == [0, 1, 1, 2]
    assert groups.padded_tokens.tolist() == [2, 2, 0, 3, 5, 5]
    assert groups.places is not None
    assert groups.places.tolist() == [0, 2, 3, 4]


def test_groups_of_equal_size_need_no_padding():
    groups = build_lora_metadata(torch.tensor([5, -1, 1, 5, 1]), max_loras=2).groups
    assert groups.padded_tokens.tolist() == groups.tokens.tolist() == [2, 4, 0, 3]
    assert groups.places is None


def test_adapter_with_more_tokens_than_the_mean_has_several_groups():
    mapping = torch.tensor([4, 9, 4, 4, 2, 4, 4, 4, 4, -1, 2])  # seven, two and one: the mean is four
    groups = build_lora_metadata(mapping, max_loras=3).groups
    assert groups.max_count == 4
    assert list(zip(groups.slots.tolist(), groups.counts.tolist(), strict=True)) == [
        (2, 2),
        (4, 4),
        (4, 3),
        (9, 1),
    ]
    assert groups.tokens.tolist() == [4, 10, 0, 2, 3, 5, 6, 7, 8, 1]
    assert groups.group_of_token.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 3]
    assert groups.padded_tokens.tolist() == [4, 10, 4, 4, 0, 2, 3, 5, 6, 7, 8, 6, 1, 1, 1, 1]
    assert groups.places is not None
    assert groups.padded_tokens[groups.places].tolist() == groups.tokens.tolist()


@pytest.mark.parametrize("counts", [[1000, *[1] * 30], [64], [1] * 40, [3, 3, 3, 17, 2]])
def test_padding_at_most_doubles_tokens_and_groups(counts):
    mapping = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    groups = build_lora_metadata(mapping, max_loras=len(counts)).groups
    assert groups.counts.sum() == sum(counts)
    assert groups.counts.max() <= groups.max_count
    assert len(groups.slots) < 2 * len(counts)
    assert len(groups.padded_tokens) < 2 * (sum(counts) + len(counts))


def test_dtypes_are_int32():
    metadata = build_lora_metadata(torch.tensor([1, -1]), max_loras=2)
    tensors = (
        metadata.token_lora_mapping,
        metadata.token_indices_sorted_by_lora_ids,
        metadata.num_tokens_per_lora,
        metadata.lora_token_start_loc,
        metadata.active_lora_ids,
        metadata.lora_tiles,
    )
    assert {tensor.dtype for tensor in tensors} == {torch.int32}


def test_result_comes_to_the_device_as_views_of_one_tensor():
    metadata = build_lora_metadata(torch.tensor([1, -1, 5]), max_loras=2, device=torch.device("meta"))
    tensors = (
        metadata.token_lora_mapping,
        metadata.token_indices_sorted_by_lora_ids,
        metadata.num_tokens_per_lora,
        metadata.lora_token_start_loc,
        metadata.active_lora_ids,
        metadata.lora_tiles,
    )
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert [tensor.storage_offset() for tensor in tensors] == [0, 3, 6, 9, 13, 16]
    assert [tensor.shape[0] for tensor in tensors[:-1]] == [3, 3, 3, 4, 3]
    assert metadata.lora_tiles.shape == (6, 4, 3)
    assert not metadata.no_adapter


def test_step_without_base_tokens_has_no_base_group():
    metadata = build_lora_metadata(torch.tensor([5, 5, 2]), max_loras=2)
    assert metadata.active_lora_ids.tolist() == [2, 5, -1]
    assert metadata.num_tokens_per_lora.tolist() == [1, 2, 0]


@pytest.mark.parametrize("mapping", [[], [-1], [-1, -1, -1]])
def test_step_without_adapters_sets_the_flag_and_has_no_groups(mapping):
    metadata = build_lora_metadata(torch.tensor(mapping, dtype=torch.int32), max_loras=3)
    assert metadata.no_adapter
    assert len(metadata.groups.slots) == len(metadata.groups.tokens) == metadata.groups.max_count == 0
    assert metadata.num_tokens == len(mapping)
    assert metadata.num_tokens_per_lora.tolist() == [len(mapping), 0, 0, 0]


def test_largest_number_of_adapters_beside_base_tokens_fits():
    metadata = build_lora_metadata(torch.tensor([2, 1, 0, -1]), max_loras=3)
    assert metadata.active_lora_ids.tolist() == [-1, 0, 1, 2]
    assert metadata.lora_token_start_loc.tolist() == [0, 1, 2, 3, 4]


def test_later_change_of_the_given_mapping_does_not_reach_the_metadata():
    mapping = torch.tensor([1, -1], dtype=torch.int32)
    metadata = build_lora_metadata(mapping, max_loras=2)
    mapping.fill_(-1)
    assert metadata.token_lora_mapping.tolist() == [1, -1]


@pytest.mark.parametrize(
    ("mapping", "max_loras", "message"),
    [
        (torch.tensor([0, 1, 2]), 2, "3 distinct adapters, expected at most 2"),
        (torch.tensor([-2, 0]), 2, "slot -2"),
        (torch.tensor([[0]]), 2, r"expected \[T\]"),
        (torch.tensor([0.0]), 2, "torch.float32"),
        (torch.tensor([0]), 0, "max_loras is 0"),
    ],
)
def test_bad_mapping_is_refused(mapping, max_loras, message):
    with pytest.raises(ValueError, match=message):
        build_lora_metadata(mapping, max_loras)
