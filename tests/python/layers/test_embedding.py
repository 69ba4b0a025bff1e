"""Token embedding and projection to logits: base results, LoRA targets and the LoRA seam of each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora_serve.kernels import LoRASliceWeights, build_lora_metadata
from lora_serve.kernels.lora_builder import install_weights
from lora_serve.layers import LogitsProjection, LoRAKind, TokenEmbedding
from support.paged_sequences import PagedSequences

VOCAB_SIZE, HIDDEN_SIZE = 31, 12
CHUNKS = [("a", 2), ("b", 1), ("c", 3), ("d", 1)]
SLOTS = [6, -1, 2, 6]
TOKEN_SLOTS = [6, 6, -1, 2, 2, 2, 6]


def make_embedding(dtype: torch.dtype = torch.float32) -> TokenEmbedding:
    embedding = TokenEmbedding(
        "model.embed_tokens", VOCAB_SIZE, HIDDEN_SIZE, dtype=dtype, device=torch.device("cpu")
    )
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    embedding.weight.copy_(weight)
    return embedding


def make_weights(rows: int, rank: int, scaling: float, seed: int, *, width: int) -> LoRASliceWeights:
    """A [rows, R] as an embedding reads it."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, rank, generator=generator)
    return LoRASliceWeights(a, torch.randn(rank, width, generator=generator), scaling)


def test_embedding_reads_each_adapters_variant_of_the_matrix() -> None:
    embedding = make_embedding()
    modules = {
        6: make_weights(VOCAB_SIZE, 5, 0.5, 1, width=HIDDEN_SIZE),
        2: make_weights(VOCAB_SIZE, 1, -2.0, 2, width=HIDDEN_SIZE),
    }
    install_weights({embedding.lora_table: {slot: (module,) for slot, module in modules.items()}})
    token_ids = torch.tensor([30, 0, 30, 30, 7, 0, 7])

    found = embedding.forward(token_ids, PagedSequences(4).step(CHUNKS, SLOTS))

    base = F.embedding(token_ids, embedding.weight)
    for row, (token, slot) in enumerate(zip(token_ids.tolist(), TOKEN_SLOTS, strict=True)):
        if slot < 0:
            assert torch.equal(found[row], base[row])
            continue
        module = modules[slot]
        matrix = embedding.weight.double() + module.scaling * module.a.double() @ module.b.double()
        torch.testing.assert_close(found[row].double(), matrix[token], atol=1e-5, rtol=0)
    assert torch.equal(embedding.weight, make_embedding().weight)


def test_embedding_without_adapters_is_the_matrix_alone() -> None:
    embedding = make_embedding(torch.bfloat16)
    token_ids = torch.tensor([1, 2], dtype=torch.int32)
    for slots in (None, [-1]):
        found = embedding.forward(token_ids, PagedSequences(4).step([("a", 2)], slots))
        assert torch.equal(found, embedding.weight[1:3])
        assert found.dtype == torch.bfloat16


def test_embedding_refuses_a_token_of_an_empty_adapter_slot() -> None:
    with pytest.raises(LookupError, match="slot 1"):
        make_embedding().forward(torch.tensor([1, 2]), PagedSequences(4).step([("a", 2)], [1]))


def make_logits_projection() -> tuple[LogitsProjection, dict[int, LoRASliceWeights]]:
    projection = LogitsProjection("lm_head", make_embedding().weight)
    modules = {}
    for slot, (rank, scaling) in {6: (5, 0.5), 2: (1, -2.0)}.items():
        transposed = make_weights(HIDDEN_SIZE, rank, scaling, slot, width=VOCAB_SIZE)
        modules[slot] = LoRASliceWeights(transposed.a.T.contiguous(), transposed.b, scaling)
    install_weights({projection.lora_table: {slot: (module,) for slot, module in modules.items()}})
    return projection, modules


def test_logits_of_each_row_are_those_of_its_adapters_matrix() -> None:
    projection, modules = make_logits_projection()
    hidden = torch.randn(4, HIDDEN_SIZE, generator=torch.Generator().manual_seed(9))

    logits = projection.forward(hidden, build_lora_metadata(torch.tensor(SLOTS), 4))

    assert logits.dtype == torch.float32
    for row, slot in enumerate(SLOTS):
        if slot < 0:
            assert torch.equal(logits[row], F.linear(hidden, projection.weight)[row])
            continue
        module = modules[slot]
        matrix = projection.weight.double() + module.scaling * (module.a.T.double() @ module.b.double()).T
        torch.testing.assert_close(logits[row].double(), matrix @ hidden[row].double(), atol=1e-4, rtol=0)


def test_logits_without_adapters_are_the_base_product_in_float32() -> None:
    projection = LogitsProjection("lm_head", make_embedding(torch.bfloat16).weight)
    hidden = torch.randn(3, HIDDEN_SIZE, generator=torch.Generator().manual_seed(9)).bfloat16()
    expected = F.linear(hidden, projection.weight).float()
    for lora in (None, build_lora_metadata(torch.tensor([-1, -1, -1]), 4)):
        assert torch.equal(projection.forward(hidden, lora), expected)


def test_logits_refuse_the_metadata_of_the_steps_tokens_and_empty_slots() -> None:
    projection, _ = make_logits_projection()
    hidden = torch.zeros(4, HIDDEN_SIZE)
    with pytest.raises(ValueError, match="x has shape"):
        projection.forward(hidden, PagedSequences(4).step(CHUNKS, SLOTS).lora)
    with pytest.raises(LookupError, match="slot 3"):
        projection.forward(hidden, build_lora_metadata(torch.tensor([6, 3, 3, -1]), 4))


def test_lora_targets_tell_kind_and_shape() -> None:
    embedding = make_embedding()
    projection = LogitsProjection("lm_head", embedding.weight)

    ((path, target),) = embedding.lora_targets()
    assert path == "model.embed_tokens"
    assert target.table is embedding.lora_table
    assert target.kind is LoRAKind.EMBEDDING
    assert (target.slice_index, target.in_features, target.out_features) == (0, VOCAB_SIZE, HIDDEN_SIZE)
    assert target.a_shape(5) == (VOCAB_SIZE, 5)

    ((path, target),) = projection.lora_targets()
    assert path == "lm_head"
    assert target.table is projection.lora_table
    assert target.kind is LoRAKind.LOGITS
    assert (target.slice_index, target.in_features, target.out_features) == (0, HIDDEN_SIZE, VOCAB_SIZE)
    assert target.a_shape(5) == (5, HIDDEN_SIZE)
