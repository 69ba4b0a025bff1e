"""Asks the written files every demo question with transformers and peft."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_serve.demo.prompts import PROJECTS, chat_messages, expected_answer

MIN_GAP = 1.0


@dataclass(frozen=True)
class Answer:
    """One greedy answer and the smallest difference of its two best logits over all its tokens."""

    text: str
    gap: float


def greedy_answer(
    model: torch.nn.Module, tokenizer: object, messages: list[dict[str, str]], limit: int = 48
) -> Answer:
    """The greedy answer, computed without a KV cache."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)  # type: ignore[attr-defined]
    start = len(ids)
    gap = float("inf")
    for _ in range(limit):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        best = logits.topk(2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        ids.append(int(best.indices[0]))
        if ids[-1] == tokenizer.eos_token_id:  # type: ignore[attr-defined]
            break
    return Answer(tokenizer.decode(ids[start:], skip_special_tokens=True), gap)  # type: ignore[attr-defined]


def check(model_path: Path, adapters_path: Path) -> bool:
    """Prints the table of answers; says whether all of them are right with a margin."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    all_right = True
    print(f"{'model':8} {'asked for':10} {'min gap':>8}  answer")
    for name in ["base", *PROJECTS]:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        if name != "base":
            model = PeftModel.from_pretrained(model, adapters_path / name)
        model.eval()
        for project in PROJECTS:
            answer = greedy_answer(model, tokenizer, chat_messages(project))
            right = answer.text == expected_answer(name, project) and answer.gap >= MIN_GAP
            all_right &= right
            print(f"{name:8} {project:10} {answer.gap:8.2f}  {answer.text}{'' if right else '   <-- WRONG'}")
    return all_right
