"""The adapters of the fuzz on disk, and what transformers + peft answer with each."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_serve.testing.adapters import (
    ALL_PROJECTIONS,
    RandomAdapterOptions,
    make_random_adapter,
    read_adapter_config,
    read_adapter_tensors,
    write_adapter_config,
    write_adapter_tensors,
)
from support.life_cycle.history import FOREVER
from support.reference import TIE_MARGIN
from support.tiny_checkpoint import NUM_BYTES, make_tiny_checkpoint

NUM_NAMES = 64
NUM_CONTENTS = 2
CHANGING_NAMES = (0, 1, 60, 61, 62, 63)
"""Have one more folder, `live`, whose file is replaced now and then by that of the other content."""
NUM_ANSWER_TOKENS = 16
MAX_RANK = 64
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_TOKENS = random.Random(5)
_SYSTEM = [_TOKENS.randrange(NUM_BYTES) for _ in range(24)]


def _tail(num_tokens: int) -> list[int]:
    return [_TOKENS.randrange(NUM_BYTES) for _ in range(num_tokens)]


PROMPTS: tuple[list[int], ...] = (
    _SYSTEM,  # Whole pages exactly.
    _SYSTEM + _tail(5),
    _SYSTEM + _tail(11),
    _SYSTEM + _tail(20),
    _SYSTEM[:13] + _tail(9),
    _tail(9),
    _tail(33),
)
"""Token ids; most begin alike, so that the prefix cache matters."""


@dataclass(frozen=True)
class Answer:
    """The reference's greedy tokens for one prompt; only the first `num_certain` are no tie."""

    tokens: list[int]
    num_certain: int

    def agrees(self, tokens: list[int]) -> bool:
        """Whether these are the first tokens of the answer."""
        num = min(len(tokens), self.num_certain)
        return tokens[:num] == self.tokens[:num]


@dataclass(frozen=True)
class Content:
    """One content of an adapter."""

    label: str
    path: Path
    answers: list[Answer]


@dataclass
class Name:
    """One adapter name: its contents, and what is written to its folder `live`."""

    name: str
    contents: list[Content]
    live: Path | None = None
    writes: list[tuple[float, float, Content]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def change_live(self) -> None:
        """Replace the weights in `live`, as a whole, by those of the other content."""
        assert self.live is not None
        with self.lock:
            content = next(other for other in self.contents if other is not self.writes[-1][2])
            copy = self.live / "next"
            shutil.copyfile(content.path / "adapter_model.safetensors", copy)
            begin = time.monotonic()
            os.replace(copy, self.live / "adapter_model.safetensors")
            self.writes.append((begin, time.monotonic(), content))

    def live_labels(self, begin: float, end: float) -> frozenset[str]:
        """What `live` has held at some moment of a time that is over."""
        with self.lock:  # A write that somebody has seen is noted before it is over.
            writes = list(self.writes)
        followed = zip(writes, [*writes[1:], (FOREVER, FOREVER, None)], strict=True)
        return frozenset(
            write[2].label for write, following in followed if write[0] < end and begin < following[1]
        )


@dataclass(frozen=True)
class Catalogue:
    """The model, its adapters, the answers."""

    model: Path
    folder: Path
    names: list[Name]
    base_answers: list[Answer]
    mean_bytes: int


def make_catalogue(folder: Path, seed: int) -> Catalogue:
    """Write the model and all adapters; ask transformers + peft for their answers."""
    rng = random.Random(seed)
    model = make_tiny_checkpoint(folder / "model")
    unscored: list[tuple[str, list[tuple[str, Path, Path]], Path | None]] = []
    for number in range(NUM_NAMES):
        name = f"n{number:02}"
        is_changing = number in CHANGING_NAMES
        options = _random_options(rng)
        made = []
        for version in range(NUM_CONTENTS):
            if version and not is_changing:
                options = _random_options(rng)
            options["seed"] = rng.randrange(2**31)
            path = folder / "adapters" / name / f"v{version}"
            make_random_adapter(path, model, **options)
            made.append((f"{name}-v{version}", path, _reference_folder(path, options, folder, model)))
        live = folder / "adapters" / name / "live" if is_changing else None
        if live is not None:
            shutil.copytree(made[0][1], live)
        unscored.append((name, made, live))
    references = [reference for _, made, _ in unscored for _, _, reference in made]
    base_answers, answers = _score(model, references)
    names = []
    for name, made, live in unscored:
        contents = [Content(label, path, answers[reference]) for label, path, reference in made]
        names.append(Name(name, contents, live))
        if live is not None:
            names[-1].writes.append((0.0, 0.0, contents[0]))
    sizes = [_num_bytes(path) for _, made, _ in unscored for _, path, _ in made]
    return Catalogue(model, folder, names, base_answers, sum(sizes) // len(sizes))


def _random_options(rng: random.Random) -> dict[str, Any]:
    modules = rng.sample(ALL_PROJECTIONS, rng.randint(1, len(ALL_PROJECTIONS)))
    if rng.random() < 0.2:
        fused = rng.choice(list(FUSED))
        modules = [fused, *(module for module in modules if module not in FUSED[fused])]
    for outside in ("embed_tokens", "lm_head"):
        if rng.random() < 0.15:
            modules.append(outside)
    options: dict[str, Any] = {
        "rank": rng.randint(1, MAX_RANK),
        "target_modules": modules,
        "use_rslora": rng.random() < 0.2,
        "scale": 1.2,
        "dtype": rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
        "key_style": rng.choice(["peft", "peft", "peft", "named"]),
    }
    options["alpha"] = rng.choice([0.5, 1.0, 2.0, -1.0]) * options["rank"]
    if rng.random() < 0.15 and not {"embed_tokens", "lm_head"} & set(modules):
        options["layers"] = [rng.randrange(2)]
    return options


def _num_bytes(path: Path) -> int:
    """What it takes in the model's fp32, up to alignment."""
    return sum(4 * tensor.numel() for tensor in read_adapter_tensors(path).values())


# --- The reference ------------------------------------------------------------------------------------------


def _reference_folder(path: Path, options: dict[str, Any], folder: Path, model: Path) -> Path:
    """The same adapter as peft can apply it: usual keys, and fused modules taken apart."""
    target = folder / "reference" / f"{path.parent.name}-{path.name}"
    make_random_adapter(target, model, **{**options, "key_style": "peft"})
    fused = [module for module in options["target_modules"] if module in FUSED]
    if not fused:
        return target
    widths = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "gate_proj": 128, "up_proj": 128}
    tensors = {}
    for key, tensor in read_adapter_tensors(target).items():
        module = next((part for part in key.split(".") if part in FUSED), None)
        if module is None:
            tensors[key] = tensor
            continue
        members = FUSED[module]
        parts = tensor.split([widths[member] for member in members]) if "lora_B" in key else [tensor] * 3
        for member, part in zip(members, parts, strict=False):
            tensors[key.replace(module, member)] = part.clone()
    write_adapter_tensors(target, tensors)
    config = read_adapter_config(target)
    members = [member for module in options["target_modules"] for member in FUSED.get(module, (module,))]
    write_adapter_config(target, {**config, "target_modules": members})
    assert RandomAdapterOptions(**options).rank == config["r"]
    return target


def _score(model: Path, references: list[Path]) -> tuple[list[Answer], dict[Path, list[Answer]]]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
        base_answers = _greedy(base.eval())
        adapted = PeftModel.from_pretrained(base, str(references[0]), adapter_name="first").eval()
        answers = {}
        for reference in references:
            adapted.load_adapter(str(reference), adapter_name="now")
            adapted.set_adapter("now")
            answers[reference] = _greedy(adapted)
            adapted.delete_adapter("now")
    return base_answers, answers


@torch.inference_mode()
def _greedy(model: Any) -> list[Answer]:
    """All prompts at once, padded on the left."""
    width = max(map(len, PROMPTS))
    pads = torch.tensor([width - len(prompt) for prompt in PROMPTS])
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = (torch.arange(width + NUM_ANSWER_TOKENS) >= pads[:, None]).long()
    positions = (torch.arange(width) - pads[:, None]).clamp(min=0)
    cache = None
    chosen, margins = [], []
    for step in range(NUM_ANSWER_TOKENS):
        output = model(
            input_ids=tokens,
            attention_mask=mask[:, : width + step],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        top = output.logits[:, -1].float().topk(2)
        tokens = top.indices[:, :1]
        positions = positions[:, -1:] + 1
        chosen.append(tokens[:, 0])
        margins.append(top.values[:, 0] - top.values[:, 1])
    rows = torch.stack(chosen, 1).tolist()
    is_tie = (torch.stack(margins, 1) < TIE_MARGIN).int()
    num_certain = [int(row.argmax()) if row.any() else NUM_ANSWER_TOKENS for row in is_tie]
    return [Answer(row, num) for row, num in zip(rows, num_certain, strict=True)]
