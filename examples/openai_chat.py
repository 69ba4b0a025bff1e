"""Chats with adapters through the `openai` package: an adapter is a model by its name.

    pip install openai
    lora-serve demo --port 8000
    python examples/openai_chat.py --model argon "What is the password of project argon?"

`--model demo` asks the base model, which knows none.
"""

from __future__ import annotations

import argparse

from openai import OpenAI


def main() -> None:
    """List what is served, then print one answer as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none", help="of a server that asks for one")
    parser.add_argument("--model", default="argon", help="an adapter's name, or the base model's")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key=args.api_key)

    for card in client.models.list():
        print(f"served: {card.id}" + (f", an adapter of {card.parent}" if card.parent else ""))

    stream = client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": args.question}],
        temperature=0,
        max_tokens=48,
        stream=True,
        stream_options={"include_usage": True},
    )
    print(f"{args.model}: ", end="")
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage is not None:
            print(f"\n{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} generated")


if __name__ == "__main__":
    main()
