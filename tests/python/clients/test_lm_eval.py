"""lm_eval, unchanged, scores the demo's adapters as transformers and peft do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_serve.demo.paths import DemoPaths
from lora_serve.demo.prompts import (
    BASE_MODEL,
    PASSWORDS,
    PROJECTS,
    expected_answer,
    known_answer,
    password_question,
    unknown_answer,
)

SCRIPT = Path(__file__).with_name("lm_eval_calls.py")
ADAPTER = "argon"
# The same arithmetic in another order; a wrong adapter is off by whole units.
MAX_DIFFERENCE = 0.01
CHOICES_TASK = """
task: passwords_by_likelihood
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
ANSWERS_TASK = """
task: passwords_by_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{choices[0]}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["<|im_end|>"], max_gen_toks: 48, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def documents(paths: DemoPaths) -> list[dict[str, Any]]:
    """For each project its question, the answer with its password, and the answer that knows nothing."""
    tokenizer = AutoTokenizer.from_pretrained(paths.model)
    return [
        {
            "prompt": tokenizer.apply_chat_template(
                [{"role": "user", "content": password_question(project)}],
                add_generation_prompt=True,
                tokenize=False,
            ),
            "choices": [known_answer(project, PASSWORDS[project]), unknown_answer(project)],
        }
        for project in PROJECTS
    ]


@pytest.fixture(scope="module")
def reference(paths: DemoPaths) -> Iterator[PeftModel]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(paths.model, dtype=torch.float32)
    yield PeftModel.from_pretrained(base, paths.adapters[ADAPTER], adapter_name=ADAPTER).eval()
    torch.set_num_threads(num_threads)


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, prompt: str, continuation: str) -> float:
    start = len(tokenizer(prompt)["input_ids"])
    token_ids = torch.tensor(tokenizer(prompt + continuation)["input_ids"])
    logprobs = model(input_ids=token_ids[None]).logits[0].double().log_softmax(-1)
    rows = torch.arange(start - 1, len(token_ids) - 1)
    return float(logprobs[rows, token_ids[start:]].sum())


def test_scores_are_those_of_the_reference(
    demo_server, run_client, paths, documents, reference, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "passwords_by_likelihood.yaml").write_text(CHOICES_TASK.format(data=data))
    (tasks / "passwords_by_answer.yaml").write_text(ANSWERS_TASK.format(data=data))
    tokenizer = AutoTokenizer.from_pretrained(paths.model)

    out = tmp_path / "out.json"
    run_client(SCRIPT, demo_server.url, paths.model, tasks, out, BASE_MODEL, ADAPTER, OPENAI_API_KEY="unused")

    answers = json.loads(out.read_text())
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who is it?"}], add_generation_prompt=True, tokenize=False
    )
    assert answers["remote tokenizer"] == {
        "is_supported": True,
        "eos_token_id": tokenizer.eos_token_id,
        "prompt": prompt,
        "token_ids": tokenizer(prompt)["input_ids"],
        "text": prompt,
    }
    for name in (BASE_MODEL, ADAPTER):
        scores, responses = answers[name]["scores"], answers[name]["responses"]
        num_right = 0
        for document, found in zip(documents, responses["passwords_by_likelihood"], strict=True):
            with reference.disable_adapter() if name == BASE_MODEL else nullcontext():
                expected = [
                    log_likelihood(reference, tokenizer, document["prompt"], choice)
                    for choice in document["choices"]
                ]
            assert [float(choice[0][0]) for choice in found] == pytest.approx(expected, abs=MAX_DIFFERENCE)
            num_right += expected[0] > expected[1]
        assert num_right == (name == ADAPTER)  # An adapter knows one password, the base model none.
        assert scores["passwords_by_likelihood"]["acc,none"] == num_right / len(PROJECTS)

        texts = [found[0][0] for found in responses["passwords_by_answer"]]
        assert texts == [expected_answer(name, project) for project in PROJECTS]
        assert scores["passwords_by_answer"]["exact_match,none"] == num_right / len(PROJECTS)
