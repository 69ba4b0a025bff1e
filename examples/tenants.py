"""Shows what two tenants of one server see: each its own adapters, and nothing of the other's.

    lora-serve serve MODEL --lora-modules argon=FOLDER bastion=FOLDER --api-keys-file examples/keys.json
    python examples/tenants.py

MODEL and the folders are those that `lora-serve demo --print-paths` names. For keys of your own:
openssl rand -hex 32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import httpx


def main() -> None:
    """Let each tenant list what it sees, and ask every adapter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--keys-file", type=Path, default=Path(__file__).with_name("keys.json"))
    args = parser.parse_args()
    tenants = [entry for entry in json.loads(args.keys_file.read_text())["keys"] if "adapters" in entry]
    names = [*(name for tenant in tenants for name in tenant["adapters"]), "no-such-adapter"]

    for tenant in tenants:
        headers = {"Authorization": f"Bearer {tenant['key']}"}
        with httpx.Client(base_url=args.url, headers=headers, timeout=120) as http:
            models = http.get("/v1/models").raise_for_status().json()["data"]
            print(f"{tenant['name']} sees {', '.join(model['id'] for model in models)}")
            for name in names:
                body = {"model": name, "prompt": "Hello", "max_tokens": 8, "temperature": 0}
                response = http.post("/v1/completions", json=body)
                # Another tenant's adapter and one that nobody has get the same answer.
                print(f"{tenant['name']} asks {name}: {response.status_code}")


if __name__ == "__main__":
    main()
