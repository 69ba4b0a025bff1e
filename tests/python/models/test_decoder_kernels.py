"""What the decoder asks of a CUDA device: which kernels, and nothing that waits. Runs on fake tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_serve.layers import StepContext, attention, ops, torch_ops
from lora_serve.models import DecoderModel, read_model_config
from lora_serve.testing.models import make_random_model
from support.paged_sequences import PagedSequences

NOT_KERNELS = {"empty", "empty_like", "new_empty"}
LAYER = ["gemm", "norm_rotary_store", "attend", "gemm", "add_rms_norm", "gemm", "silu_mul", "gemm"]


class KernelLog(TorchDispatchMode):
    """Names what runs on the device, in order; views and allocations run nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        returned = func._schema.returns[0].alias_info if func._schema.returns else None
        is_view = returned is not None and not returned.is_write
        if func.namespace == "aten" and not is_view and name not in NOT_KERNELS:
            self.names.append("gemm" if name in ("linear", "mm", "addmm", "addmm_") else name)
        return func(*args, **(kwargs or {}))

    def kernel(self, name: str, result: Callable[..., torch.Tensor]):
        def run(*args):
            self.names.append(name)
            return result(*args)

        return run


class Backend:
    name = "logged"

    def __init__(self, log: KernelLog) -> None:
        self.attend = log.kernel("attend", lambda query, *_: torch.empty(query.shape, device="cuda"))


def fake_kernels(log: KernelLog) -> ops._TritonOps:
    def query_part(qkv, positions, cos_sin, slot_mapping, kv_layer, *_):
        num_kv_heads, head_dim = kv_layer.k.shape[2:]
        heads = qkv.view(len(qkv), -1, head_dim)
        return heads.narrow(1, 0, heads.shape[1] - 2 * num_kv_heads)

    plain = ops._Ops(
        log.kernel("rms_norm", lambda x, *_: torch.empty_like(x)),
        log.kernel("add_rms_norm", lambda x, *_: torch.empty_like(x)),
        log.kernel("norm_rotary_store", query_part),
        log.kernel("silu_mul", lambda x: x.new_empty(len(x), x.shape[1] // 2)),
        torch_ops.linear,
    )
    return ops._TritonOps(plain, *5 * [log.kernel("with adapters", lambda x, *_: x)])


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("MistralForCausalLM", {"sliding_window": 7}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {}),
    ],
)
@pytest.mark.parametrize("num_tokens", [5, ops.MANY_TOKENS + 1])
def test_a_step_on_cuda_runs_nine_kernels_a_layer_and_waits_for_none(
    num_tokens: int, architecture: str, extra: dict, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_random_model(tmp_path, architecture, num_layers=3, extra_config=extra)
    log = KernelLog()
    monkeypatch.setitem(attention._BACKENDS, "logged", lambda: Backend(log))
    monkeypatch.setattr(ops, "_triton_ops", lambda: fake_kernels(log))
    device = torch.device("cuda", 0)
    with FakeTensorMode():
        model = DecoderModel(read_model_config(tmp_path), device=device, attention_backend="logged")
        kv_layers = PagedSequences(4, device=device).make_kv_layers(model.config)
        index = torch.empty(num_tokens, dtype=torch.int64, device=device)
        context = StepContext(positions=index, slot_mapping=index, lora=None)
        with log:
            hidden = model.forward(index, context, kv_layers, None)
            of_step, log.names = log.names, []
            model.compute_base_logits(hidden)

    adds_in_product = num_tokens > ops.MANY_TOKENS and not extra.get("attention_bias")
    norm = "rms_norm" if adds_in_product else "add_rms_norm"
    layer = [norm if name == "add_rms_norm" else name for name in LAYER]
    assert of_step == ["embedding", "rms_norm", *layer, *2 * [norm, *layer], norm]
    assert log.names == ["gemm"]
