"""Fills a CUDA device: model, adapter arena, and with the rest of its share the KV pages."""

from __future__ import annotations

import gc
import logging
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.stage_log import log_stage
from lora_serve.executor.cuda_executor import CudaExecutor
from lora_serve.executor.graph_capture import bytes_of_more_sizes
from lora_serve.executor.kv_tensors import (
    allocate_kv_pool,
    choose_max_model_len,
    choose_num_device_pages,
    choose_num_host_pages,
    kv_layers_of,
)
from lora_serve.executor.model_setup import load_configured_model, make_adapter_memory
from lora_serve.executor.prompt_logprobs import MAX_LOGIT_ROWS
from lora_serve.executor.transfers import PageTransfers, make_page_transfers
from lora_serve.kernels import LoRAMetadata, build_lora_metadata
from lora_serve.kernels.triton_lora_linear import warm_up_token_counts
from lora_serve.layers.attention import KVLayer
from lora_serve.layers.step_context import AttentionMetadata, StepContext
from lora_serve.lora.manager import LoRAManager
from lora_serve.models.decoder import DecoderModel

logger = logging.getLogger(__name__)

_NUM_TRIAL_SIZES = 3


@dataclass(eq=False)
class CudaSetup:
    """What a CUDA executor works with.

    Parameters
    ----------
    device : torch.device
        With its index.
    model : DecoderModel
        Its weights filled.
    lora : LoRAManager
        The adapter memory.
    kv_layers : list of KVLayer
        The device's pages.
    transfers : PageTransfers
        Copies between the tiers.
    num_device_pages, num_host_pages : int
        KV pages of each tier.
    max_model_len : int
        Longest prompt plus answer in tokens.
    decode_graph_sizes : tuple of int
        Padded batch sizes to capture decode steps for, ascending; empty = none.
    prefill_graph_sizes : tuple of int
        Padded numbers of tokens to capture pieces of other steps for, ascending; empty = none.
    """

    device: torch.device
    model: DecoderModel
    lora: LoRAManager
    kv_layers: list[KVLayer]
    transfers: PageTransfers
    num_device_pages: int
    num_host_pages: int
    max_model_len: int
    decode_graph_sizes: tuple[int, ...]
    prefill_graph_sizes: tuple[int, ...] = ()

    def close(self) -> None:
        """Free the adapter memory and the KV pages of both tiers; no step may run."""
        with ExitStack() as rest:  # All of it, whatever one of them raises.
            rest.callback(self.transfers.close)
            rest.callback(self.lora.close)
            self.kv_layers = []


def set_up_cuda(config: EngineConfig) -> CudaSetup:
    """Load the model and take the device's memory.

    Raises
    ------
    InvalidArgumentError
        There is no such device; the model cannot be loaded; it, the adapters and one request do not fit the
        device's share; or the machine does not give the host's memory.
    """
    device = _find_device(config.device)
    with log_stage(logger, "model"):
        model = load_configured_model(config)
        torch.cuda.synchronize(device)
    with ExitStack() as made:  # What has threads or locked memory, for the case that it does not fit.
        with log_stage(logger, "adapter memory"):
            lora = make_adapter_memory(config, model)
        made.callback(lora.close)
        with log_stage(logger, "profiling run"):
            free_bytes = _measure_free_bytes(config, model)
        has_graphs = model.attention_backend.supports_graphs
        graph_sizes = config.chosen_cuda_graph_sizes if has_graphs else ()
        prefill_sizes = config.chosen_prefill_graph_sizes if has_graphs else ()
        if config.num_device_pages is None and config.kv_memory_gb is None and free_bytes > 0:
            with log_stage(logger, "trial of the executor"):
                free_bytes -= _measure_executor_bytes(config, model, lora, graph_sizes, prefill_sizes)
        num_device_pages = choose_num_device_pages(config, model.config, free_bytes)
        num_host_pages = choose_num_host_pages(config, model.config)
        max_model_len = choose_max_model_len(config, model.config, num_device_pages)
        with log_stage(logger, "KV pages"):
            pool = allocate_kv_pool(model.config, num_device_pages, config.page_size, device)
            transfers = make_page_transfers(pool, num_host_pages)
        made.pop_all()
    logger.info(
        "%d KV pages of %d tokens on the device, %d on the host; requests of up to %d tokens",
        num_device_pages,
        config.page_size,
        num_host_pages,
        max_model_len,
    )
    return CudaSetup(
        device=device,
        model=model,
        lora=lora,
        kv_layers=kv_layers_of(pool),
        transfers=transfers,
        num_device_pages=num_device_pages,
        num_host_pages=num_host_pages,
        max_model_len=max_model_len,
        decode_graph_sizes=graph_sizes,
        prefill_graph_sizes=prefill_sizes,
    )


def _find_device(name: str) -> torch.device:
    if not torch.cuda.is_available():
        raise InvalidArgumentError(
            f"device is {name!r} but torch finds no CUDA device; use --device cpu, or a torch built for CUDA"
        )
    device = torch.device(name)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InvalidArgumentError(
            f"device is {name!r} but this machine has {torch.cuda.device_count()} CUDA devices"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _measure_free_bytes(config: EngineConfig, model: DecoderModel) -> int:
    """What the device's share has left once the largest step has run; below 0 = it takes more.

    The allocator keeps what that step took, so whatever else uses the device counts, too. Smaller steps run
    first: together they compile every kernel that a step may need, with adapters or without.
    """
    with torch.inference_mode():
        for num_tokens in warm_up_token_counts(config.max_num_batched_tokens):
            for has_adapter in (False, True):  # The largest memory last.
                _run_step(config, model, num_tokens, has_adapter=has_adapter)
    torch.cuda.synchronize(model.device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(model.device)
    return free_bytes - int(total_bytes * (1 - config.gpu_memory_utilization))


def _measure_executor_bytes(
    config: EngineConfig,
    model: DecoderModel,
    lora: LoRAManager,
    graph_sizes: tuple[int, ...],
    prefill_sizes: tuple[int, ...],
) -> int:
    """What an executor takes beside KV pages: inputs, logits, attention's memory, graphs.

    One is made on a single KV page, with graphs of the largest sizes alone, and dropped. How much the driver
    keeps of each graph is nowhere to be asked for.
    """
    device = model.device
    pool = allocate_kv_pool(model.config, 1, config.page_size, device)
    transfers = make_page_transfers(pool, 0)
    trial = CudaSetup(
        device=device,
        model=model,
        lora=lora,
        kv_layers=kv_layers_of(pool),
        transfers=transfers,
        num_device_pages=1,
        num_host_pages=0,
        max_model_len=config.max_model_len or model.config.max_model_len,
        decode_graph_sizes=graph_sizes[-_NUM_TRIAL_SIZES:],
        prefill_graph_sizes=prefill_sizes[-_NUM_TRIAL_SIZES:],
    )
    before = _free_bytes(device)
    try:
        executor = CudaExecutor(config, trial)
        num_bytes = before - _free_bytes(device)
        for graphs, sizes in ((executor.graphs, graph_sizes), (executor.prefill_graphs, prefill_sizes)):
            if graphs is not None:
                num_bytes += bytes_of_more_sizes(graphs.num_bytes, len(sizes) - len(graphs.num_bytes))
        del executor, graphs  # Or they would keep what is to be given back.
    except torch.OutOfMemoryError as error:
        raise InvalidArgumentError(
            f"the buffers of {config.max_num_seqs} requests and the CUDA graphs do not fit beside the model, "
            f"{before / 2**30:.2f} GiB are free; lower --max-num-seqs, --cuda-graph-sizes or "
            "--prefill-graph-sizes, or use --enforce-eager"
        ) from error
    finally:
        transfers.close()
    gc.collect()
    torch.cuda.empty_cache()
    return max(0, num_bytes)


def _free_bytes(device: torch.device) -> int:
    """Free memory of the device, with what the allocator only keeps for later."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _run_step(config: EngineConfig, model: DecoderModel, num_tokens: int, *, has_adapter: bool) -> None:
    """One prefill, on one page that is read again and again. What it computes means nothing."""
    device, page_size = model.device, config.page_size
    num_pages = -(-num_tokens // page_size)
    kv_layers = kv_layers_of(allocate_kv_pool(model.config, 1, page_size, device))

    def filled(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    def all_of_one_adapter(num_rows: int) -> LoRAMetadata | None:
        if not has_adapter:
            return None
        return build_lora_metadata(torch.zeros(num_rows, dtype=torch.int32), config.max_loras, device=device)

    attention = AttentionMetadata(
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        num_computed_tokens=filled(0, 1),
        seq_lens=filled(num_tokens, 1),
        page_table=filled(0, 1, num_pages),
        host_query_lens=[num_tokens],
        host_seq_lens=[num_tokens],
        page_indices=filled(0, num_pages),
        host_page_indptr=np.array([0, num_pages], dtype=np.int32),
    )
    context = StepContext(
        positions=filled(0, num_tokens, dtype=torch.int64),
        slot_mapping=filled(-1, num_tokens, dtype=torch.int64),
        lora=all_of_one_adapter(num_tokens),
    )
    token_ids = filled(0, num_tokens, dtype=torch.int64)
    hidden = model.forward(token_ids, context, kv_layers, model.plan_attention(attention, kv_layers))
    sampled = hidden[: max(config.max_num_seqs, MAX_LOGIT_ROWS)]
    logits = model.compute_logits(sampled, all_of_one_adapter(len(sampled)))
    logits.softmax(dim=-1)  # As when every row is sampled by its parameters.
