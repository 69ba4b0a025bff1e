"""Loads an adapter while the server runs, replaces it, and unloads it.

    lora-serve demo --port 8000
    python examples/load_adapter.py --adapter FOLDER --replacement FOLDER --question TEXT

A folder is what PEFT's `save_pretrained` writes, as the server sees it; other sources work too.
"""

from __future__ import annotations

import argparse

import httpx

NAME = "guest"


def ask(http: httpx.Client, question: str) -> None:
    """Print the adapter's answer and which of its generations gave it, or why there is none."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 48,
    }
    response = http.post("/v1/chat/completions", json=body)
    answer = response.json()
    if response.status_code == httpx.codes.OK:
        print(f"{answer['system_fingerprint']}: {answer['choices'][0]['message']['content']}")
    else:
        print(f"{response.status_code}: {answer['error']['message']}")


def main() -> None:
    """Load, ask, replace, ask, unload, ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapter", required=True, help="what is loaded first")
    parser.add_argument("--replacement", required=True, help="what takes its place")
    parser.add_argument("--question", required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none", help="one that may load adapters")
    args = parser.parse_args()
    headers = {"Authorization": f"Bearer {args.api_key}"}

    with httpx.Client(base_url=args.url, headers=headers, timeout=120) as http:
        # Each call returns when it is done: an adapter that is loaded serves.
        body = {"lora_name": NAME, "lora_path": args.adapter}
        print("load:", http.post("/v1/load_lora_adapter", json=body).raise_for_status().json()["message"])
        ask(http, args.question)

        # Without load_inplace other content under a name in use is refused.
        body["lora_path"] = args.replacement
        refused = http.post("/v1/load_lora_adapter", json=body)
        print(f"load: {refused.status_code}: {refused.json()['error']['message']}")
        # With it, new requests get the new weights, while running ones end on the old.
        body_in_place = {**body, "load_inplace": True}
        loaded = http.post("/v1/load_lora_adapter", json=body_in_place).raise_for_status().json()
        print("replace:", loaded["message"])
        ask(http, args.question)

        unloaded = http.post("/v1/unload_lora_adapter", json={"lora_name": NAME}).raise_for_status().json()
        print("unload:", unloaded["message"])
        ask(http, args.question)


if __name__ == "__main__":
    main()
