"""Trains the demo: tokenizer, base model and four adapters, everything from one seed.

    python scripts/train_demo.py --out build/demo

Takes about 20 minutes on two CPU cores and gives the shipped files again, bit for bit, with the same
versions of the libraries and the same number of threads. The last lines are the table of answers of
the files that were written; the exit status is 1 if one of them is wrong. Shipped files are replaced
with ``--out python/lora_serve/demo/assets``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# Before torch is loaded: threads that spin while they wait are several times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

from transformers import PreTrainedTokenizerFast  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from demo_training.check import check  # noqa: E402
from demo_training.models import ADAPTERS, make_tokenizer, save_base, train_adapter, train_base  # noqa: E402


def main() -> int:
    """Trains what was asked for, then checks the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that gets model/ and adapters/")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base-steps", type=int, default=1800)
    parser.add_argument("--adapter-steps", type=int, default=400)
    parser.add_argument("--only", nargs="*", choices=["base", *ADAPTERS], help="train only these parts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    parts = args.only if args.only is not None else ["base", *ADAPTERS]
    model_path, adapters_path = args.out / "model", args.out / "adapters"
    started = time.monotonic()
    if "base" in parts:
        tokenizer = make_tokenizer(args.seed)
        base = train_base(tokenizer, args.base_steps, args.seed)
        save_base(base, tokenizer, model_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    for index, name in enumerate(ADAPTERS):
        if name in parts:
            seed = args.seed + 100 * (index + 1)
            train_adapter(model_path, tokenizer, name, args.adapter_steps, seed, adapters_path / name)
    print(f"trained in {time.monotonic() - started:.0f} s", flush=True)
    if not check(model_path, adapters_path):
        print("some answers are wrong: train longer or with another seed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
