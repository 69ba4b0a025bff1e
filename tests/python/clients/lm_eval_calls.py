"""Run by Python of the clients' environment: lm_eval's scores and samples of several models, as JSON.

Under 'remote tokenizer' stands what its tokenizer without files makes of the tasks' prompts.

Usage: lm_eval_calls.py URL TOKENIZER TASKS_FOLDER OUT MODEL...

One process for all of them: most of a run's time goes into importing the package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support


def main() -> None:
    url, tokenizer, tasks_folder, out, *models = sys.argv[1:]
    manager = TaskManager(include_path=tasks_folder, include_defaults=False)
    answers = {"remote tokenizer": ask_remote_tokenizer(f"{url}/v1/completions", "Who is it?")}
    for model in models:
        found = simple_evaluate(
            model="local-completions",
            model_args={
                "model": model,
                "base_url": f"{url}/v1/completions",
                "tokenizer": tokenizer,
                "num_concurrent": 4,
                "max_retries": 1,
            },
            tasks=sorted(path.stem for path in Path(tasks_folder).glob("*.yaml")),
            task_manager=manager,
            batch_size=4,
            bootstrap_iters=0,
            log_samples=True,
        )
        answers[model] = {
            "scores": found["results"],
            "responses": {
                task: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
                for task, samples in found["samples"].items()
            },
        }
    Path(out).write_text(json.dumps(answers))


def ask_remote_tokenizer(url: str, question: str) -> dict[str, object]:
    tokenizer = RemoteTokenizer(url)
    # It lets templates use no name that is not given; the demo's asks for tools and their calls.
    message = {"role": "user", "content": question, "tool_calls": []}
    prompt = tokenizer.apply_chat_template([message], tools=None)
    token_ids = tokenizer.encode(prompt)
    return {
        "is_supported": check_remote_tokenizer_support(url),
        "eos_token_id": tokenizer.eos_token_id,
        "prompt": prompt,
        "token_ids": token_ids,
        "text": tokenizer.decode(token_ids),
    }


if __name__ == "__main__":
    main()
