"""Answers prompts without a server, each with an adapter of its own, all in the same steps.

    python examples/offline_batch.py --model MODEL --lora-modules sql=/adapters/sql law=/adapters/law \
        --prompt sql "Who are you?" --prompt law "Who are you?" --prompt base "Who are you?"

The engine runs inside this process, on a GPU where there is one.
"""

from __future__ import annotations

import argparse

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.llm import LLM

BASE = "base"


def main() -> None:
    """Load the adapters, answer everything in one call, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="a Hugging Face directory or hub id")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu or cuda")
    parser.add_argument("--lora-modules", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument(
        "--prompt",
        nargs=2,
        action="append",
        required=True,
        metavar=("ADAPTER", "TEXT"),
        help=f"an adapter's name, or '{BASE}' for the base model, and what to ask it; repeat it",
    )
    args = parser.parse_args()
    adapters = [None if name == BASE else name for name, _ in args.prompt]
    conversations = [[{"role": "user", "content": text}] for _, text in args.prompt]

    with LLM(args.model, device=args.device) as llm:
        for module in args.lora_modules:
            name, _, path = module.partition("=")
            llm.load_lora_adapter(name, path)
        outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=48), lora_request=adapters)
        for name, output in zip(adapters, outputs, strict=True):
            print(f"{name or BASE}: {output.outputs[0].text}")


if __name__ == "__main__":
    main()
