"""Batches and the training loop that the base model and the adapters share."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from .text import Sample


@dataclass(frozen=True)
class Encoded:
    """Token ids and the weight of each token in the loss."""

    token_ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast one model is trained."""

    name: str
    num_steps: int
    tokens_a_batch: int
    learning_rate: float
    weight_decay: float
    prompt_weight: float
    seed: int


def encode(tokenizer: PreTrainedTokenizerFast, sample: Sample, prompt_weight: float) -> Encoded:
    """Tokens of one sample; the parts are tokenised apart, as prompt and answer are when served."""
    token_ids: list[int] = []
    weights: list[float] = []
    for text, is_answer in sample.parts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        token_ids += ids
        weights += [1.0 if is_answer else prompt_weight] * len(ids)
    return Encoded(token_ids, weights)


def make_batches(samples: list[Encoded], tokens_a_batch: int, rng: random.Random) -> list[list[Encoded]]:
    """Groups samples of similar length, so that little is padded; the order of batches is random."""
    batches: list[list[Encoded]] = []
    window = 4096
    for start in range(0, len(samples), window):
        ordered = sorted(samples[start : start + window], key=lambda sample: len(sample.token_ids))
        group: list[list[Encoded]] = [[]]
        for sample in ordered:
            if group[-1] and (len(group[-1]) + 1) * len(sample.token_ids) > tokens_a_batch:
                group.append([])
            group[-1].append(sample)
        rng.shuffle(group)
        batches += group
    return batches


def batch_loss(model: torch.nn.Module, batch: list[Encoded]) -> torch.Tensor:
    """Weighted cross entropy. Padding stands on the right and has weight 0, so no mask is needed."""
    width = max(len(sample.token_ids) for sample in batch)
    token_ids = torch.zeros(len(batch), width, dtype=torch.long)
    weights = torch.zeros(len(batch), width)
    for row, sample in enumerate(batch):
        token_ids[row, : len(sample.token_ids)] = torch.tensor(sample.token_ids)
        weights[row, : len(sample.weights)] = torch.tensor(sample.weights)
    logits = model(input_ids=token_ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten(), reduction="none")
    flat_weights = weights[:, 1:].flatten()
    return (losses * flat_weights).sum() / flat_weights.sum()


def train(
    model: torch.nn.Module,
    plan: TrainingPlan,
    tokenizer: PreTrainedTokenizerFast,
    make_sample: Callable[[], Sample],
) -> float:
    """Trains the parameters that require a gradient; returns the mean loss of the last 50 steps."""
    rng = random.Random(plan.seed)
    torch.manual_seed(plan.seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=plan.learning_rate, betas=(0.9, 0.98)
    )
    warmup = max(10, plan.num_steps // 20)

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, plan.num_steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    batches: list[list[Encoded]] = []
    recent: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(plan.num_steps):
        if not batches:
            samples = [encode(tokenizer, make_sample(), plan.prompt_weight) for _ in range(4096)]
            batches = make_batches(samples, plan.tokens_a_batch, rng)
        loss = batch_loss(model, batches.pop())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-49:], loss.item()]
        if (step + 1) % 50 == 0 or step + 1 == plan.num_steps:
            seconds = time.monotonic() - started
            mean = sum(recent) / len(recent)
            print(
                f"{plan.name}: step {step + 1}/{plan.num_steps} loss {mean:.4f} ({seconds:.0f} s)", flush=True
            )
    model.eval()
    return sum(recent) / len(recent)
