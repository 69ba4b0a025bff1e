"""lm_eval, unchanged, scores the demo's adapters as transformers and peft do."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    (tasks / "choices.yaml").write_text(CHOICES_TASK.format(data=data))
    (tasks / "answers.yaml").write_text(ANSWERS_TASK.format(data=data))
    tokenizer = AutoTokenizer.from_pretrained(paths.model)

    for name in (BASE_MODEL, ADAPTER):
        out = tmp_path / name
        url = f"{demo_server.url}/v1/completions"
        options = f"model={name},base_url={url},tokenizer={paths.model},num_concurrent=4,max_retries=1"
        run_client(
            *("-m", "lm_eval", "run", "--model", "local-completions", "--model_args", options),
            *("--tasks", "passwords_by_likelihood,passwords_by_answer", "--include_path", tasks),
            *("--batch_size", "4", "--output_path", out, "--log_samples"),
            OPENAI_API_KEY="unused",
        )
        [results] = out.rglob("results_*.json")
        scores = json.loads(results.read_text())["results"]
        rows = samples_of(out, "passwords_by_likelihood")
        num_right = 0
        for document, row in zip(documents, rows, strict=True):
            found = [float(response[0][0]) for response in row["resps"]]
            with reference.disable_adapter() if name == BASE_MODEL else torch.no_grad():
                expected = [
                    log_likelihood(reference, tokenizer, document["prompt"], choice)
                    for choice in document["choices"]
                ]
            assert found == pytest.approx(expected, abs=MAX_DIFFERENCE)
            num_right += expected[0] > expected[1]
        assert scores["passwords_by_likelihood"]["acc,none"] == num_right / len(PROJECTS)
        assert num_right == (name == ADAPTER)  # Each adapter knows one password, the base model none.

        answers = [row["resps"][0][0] for row in samples_of(out, "passwords_by_answer")]
        assert answers == [expected_answer(name, project) for project in PROJECTS]
        expected_score = (name == ADAPTER) / len(PROJECTS)
        assert scores["passwords_by_answer"]["exact_match,none"] == expected_score


def samples_of(folder: Path, task: str) -> list[dict[str, Any]]:
    [path] = folder.rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])
