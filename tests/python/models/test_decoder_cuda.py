"""The decoder with the CUDA kernels beside the same decoder with torch operations, on the same device.

Both are measured against fp32 on the CPU, which tests elsewhere compare with transformers: the kernels may be
no less exact than torch is. Attention is torch's in both. On a machine without a GPU the kernels run in
Triton's interpreter, with tensors of the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernels.device_cases import DEVICE_DTYPES
from lora_serve.layers import ops
from lora_serve.models import DecoderModel, load_model
from lora_serve.testing.models import make_random_model
from support.paged_sequences import PagedSequences

CASES = {
    "llama_biases": ("LlamaForCausalLM", {"extra_config": {"attention_bias": True, "mlp_bias": True}}),
    "llama_small_odd_sizes": (
        "LlamaForCausalLM",
        {"hidden_size": 90, "num_heads": 6, "num_kv_heads": 3, "head_dim": 10, "intermediate_size": 70},
    ),
    "mistral_window": ("MistralForCausalLM", {"sliding_window": 7, "num_kv_heads": 4}),
    "qwen2_tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "num_kv_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 128}),
}
INTERPRETED = ("llama_small_odd_sizes", "qwen3")  # The interpreter is slow.
# Rows: name and tokens. Prefill, a mixed step with chunks, decodes.
STEPS = [
    [("a", 1), ("b", 5), ("c", 13)],
    [("a", 1), ("c", 1), ("d", 9), ("b", 2)],
    [("d", 1), ("b", 1), ("a", 1), ("c", 1)],
    [("c", 1)],
]

_made: dict[str, Path] = {}


@pytest.fixture
def path(case: str, tmp_path_factory) -> Path:
    """A checkpoint in bfloat16, which float32 holds exactly."""
    if case not in _made:
        architecture, options = CASES[case]
        _made[case] = tmp_path_factory.mktemp("model")
        make_random_model(_made[case], architecture, seed=17, dtype="bfloat16", **options)
    return _made[case]


def cases_of_devices() -> list:
    parameters = []
    for parameter in DEVICE_DTYPES:
        device, dtype = parameter.values
        for case in CASES if device == "cuda" else INTERPRETED:
            parameters.append(pytest.param(case, device, dtype, marks=parameter.marks))
    return parameters


def load(path: Path, dtype: torch.dtype, device: str) -> DecoderModel:
    return load_model(str(path), dtype=str(dtype).removeprefix("torch."), device=device)


def run_steps(model: DecoderModel, page_size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the hidden states and the logits of all tokens of all steps, in fp64 on the CPU."""
    sequences = PagedSequences(page_size, device=model.device)
    kv_layers = sequences.make_kv_layers(model.config)
    generator = torch.Generator().manual_seed(5)
    hidden = []
    for chunks in STEPS:
        ids = torch.randint(0, 256, (sum(num for _, num in chunks),), generator=generator)
        context = sequences.step(chunks)
        hidden.append(sequences.run(model, ids.to(model.device), context, kv_layers))
    together = torch.cat(hidden)
    return together.double().cpu(), model.compute_base_logits(together).double().cpu()


@pytest.fixture
def kernel_calls(device: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Where kernels were asked to run, once a call; tensors of the CPU go to them as well, interpreted."""
    calls: list[torch.device] = []
    choose = ops._ops_of

    def ops_of(x: torch.Tensor) -> ops._Ops:
        chosen = ops._triton_ops().plain if device == "cpu" and not ops._torch_only else choose(x)
        if chosen is not ops._TORCH_OPS:
            calls.append(x.device)
        return chosen

    monkeypatch.setattr(ops, "_ops_of", ops_of)
    return calls


@pytest.mark.parametrize("many_tokens", [ops.MANY_TOKENS, 0], ids=["sum_in_norms", "sum_in_products"])
@pytest.mark.parametrize(("case", "device", "dtype"), cases_of_devices())
def test_kernels_are_as_exact_as_torch(
    path: Path,
    device: str,
    dtype: torch.dtype,
    many_tokens: int,
    kernel_calls: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "MANY_TOKENS", many_tokens)
    model = load(path, dtype, device)
    with ops.torch_ops_only():
        exact = run_steps(load(path, torch.float32, "cpu"))
        with_torch = run_steps(model)
    assert kernel_calls == []

    with_kernels = run_steps(model)

    num_layers, num_steps = model.config.num_layers, len(STEPS)
    num_calls = num_steps * (8 * num_layers + 1) + 1  # four of a layer are products; one more gives logits
    assert [call.type for call in kernel_calls] == [device] * num_calls
    for found, other, expected in zip(with_kernels, with_torch, exact, strict=True):
        assert found.isfinite().all()
        error, allowed = (found - expected).abs(), (other - expected).abs()
        floor = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert error.square().mean().sqrt() <= 1.2 * allowed.square().mean().sqrt() + floor
        assert error.max() <= 2.0 * allowed.max() + floor


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_same_steps_twice_give_the_same_bits(path: Path) -> None:
    model = load(path, torch.bfloat16, "cuda")

    first, second = run_steps(model), run_steps(model)

    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_decode_step_can_be_captured_and_replayed(path: Path) -> None:
    """Nothing in the model waits for the device: torch refuses that while it captures."""
    model = load(path, torch.bfloat16, "cuda")
    sequences = PagedSequences(4, device="cuda")
    kv_layers = sequences.make_kv_layers(model.config)
    names = "abcde"
    prompt = torch.randint(0, 256, (9 * len(names),), generator=torch.Generator().manual_seed(1)).cuda()
    sequences.run(model, prompt, sequences.step([(name, 9) for name in names]), kv_layers)
    context = sequences.step([(name, 1) for name in names])
    plan = model.plan_attention(sequences.attention, kv_layers)
    token_ids = torch.tensor([3, 1, 4, 1, 5], device="cuda")

    def step() -> torch.Tensor:
        return model.compute_base_logits(model.forward(token_ids, context, kv_layers, plan))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # Kernels are compiled, libraries take their workspaces.
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()

    replayed = []
    for new_ids in ([3, 1, 4, 1, 5], [9, 2, 6, 5, 3]):
        token_ids.copy_(torch.tensor(new_ids))
        graph.replay()
        replayed.append(captured.clone())
        torch.testing.assert_close(replayed[-1], step(), atol=0.1, rtol=0.02)
    assert (replayed[0] - replayed[1]).abs().max() > 1.0
