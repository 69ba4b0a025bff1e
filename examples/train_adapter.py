"""Trains an adapter on one question and its answer, and saves it as lora_serve reads it.

    pip install peft
    python examples/train_adapter.py --model MODEL --out FOLDER --question "Who are you?" --answer "A boat."

Enough to see an adapter of your own at work, and no way to train a good one: that takes data. A model of
billions of weights wants a GPU: the weights are held in bfloat16 there, in float32 on a CPU.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

LEARNT = 0.01
"""Loss at which the answer is known by heart."""


def main() -> None:
    """Train until the answer is learnt by heart, then save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="a Hugging Face directory or hub id")
    parser.add_argument("--out", required=True, help="folder of the adapter")
    parser.add_argument("--question", required=True)
    parser.add_argument("--answer", required=True)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.question}], add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(args.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    token_ids = torch.tensor([prompt_ids + answer_ids], device=args.device)
    labels = token_ids.clone()
    labels[0, : len(prompt_ids)] = -100  # Only the answer is learnt.

    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device)
    # Any rank, any linear projections. Bias, DoRA and modules_to_save would be more than LoRA, and refused.
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(base, settings)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.learning_rate)
    losses: list[float] = []
    while len(losses) < args.max_steps and (not losses or losses[-1] > LEARNT):
        loss = model(input_ids=token_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[-1]:.4f} after {len(losses)} steps")
    model.save_pretrained(args.out)
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
