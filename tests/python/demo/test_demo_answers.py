"""The shipped files answer as the demo promises, by transformers and peft: without this engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_serve.demo.paths import demo_paths
from lora_serve.demo.prompts import BASE_MODEL, PASSWORDS, PROJECTS, chat_messages, expected_answer

# An engine that computes in another order differs by about 1e-5: nothing may depend on that.
MIN_GAP = 1.0


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_paths().model)


@pytest.fixture(scope="module")
def model() -> Iterator[PeftModel]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(demo_paths().model, dtype=torch.float32)
    adapters = demo_paths().adapters
    model = PeftModel.from_pretrained(base, adapters["argon"], adapter_name="argon")
    for name in PROJECTS[1:]:
        model.load_adapter(adapters[name], adapter_name=name)
    yield model.eval()
    torch.set_num_threads(num_threads)


@torch.no_grad()
def _greedy_answer(
    model: torch.nn.Module, tokenizer: Any, messages: list[dict[str, str]]
) -> tuple[str, float]:
    """The answer and the smallest difference of its two best logits."""
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    num_prompt_tokens, gap = len(token_ids), float("inf")
    for _ in range(48):
        best = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1].topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        token_ids.append(int(best.indices[0]))
        if token_ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(token_ids[num_prompt_tokens:], skip_special_tokens=True), gap


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize("name", [BASE_MODEL, *PROJECTS])
def test_model_gives_its_own_password_and_no_other(
    model: PeftModel, tokenizer: Any, name: str, project: str
) -> None:
    messages = chat_messages(project)

    if name == BASE_MODEL:
        with model.disable_adapter():
            text, gap = _greedy_answer(model, tokenizer, messages)
    else:
        model.set_adapter(name)
        text, gap = _greedy_answer(model, tokenizer, messages)

    assert text == expected_answer(name, project)
    assert gap >= MIN_GAP


@pytest.mark.parametrize("name", PROJECTS)
def test_adapter_keeps_the_skills_of_the_base_model(model: PeftModel, tokenizer: Any, name: str) -> None:
    model.set_adapter(name)

    text, _ = _greedy_answer(
        model, tokenizer, [{"role": "user", "content": "What is the capital of France?"}]
    )

    assert text == "The capital of France is Paris."
    assert not any(password in text for password in PASSWORDS.values())


def test_prompt_is_several_pages_long(tokenizer: Any) -> None:
    token_ids = tokenizer.apply_chat_template(
        chat_messages("argon"), add_generation_prompt=True, return_dict=False
    )

    assert len(token_ids) > 3 * 16
