"""Makes and saves the base model and the four adapters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lora_serve.demo.prompts import PASSWORDS

from .text import TextMaker
from .tokenizer import END_OF_TEXT, IM_END, MAX_MODEL_LEN, VOCAB_SIZE, train_tokenizer
from .training import TrainingPlan, train

BASE_NAME = "lora-serve-demo"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

# Four kinds of adapters, so that the demo shows more than one shape: two projections; all seven;
# rsLoRA; rank and scaling that differ by module and by layer.
ADAPTERS: dict[str, LoraConfig] = {
    "argon": LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
    "bastion": LoraConfig(r=16, lora_alpha=32, target_modules=ATTENTION + MLP),
    "citadel": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=ATTENTION),
    "dagger": LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["o_proj", *MLP],
        rank_pattern={"down_proj": 8, "layers.3.mlp.up_proj": 6},
        alpha_pattern={"down_proj": 24, "layers.0.self_attn.o_proj": 6},
    ),
}


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer, trained on the base's text."""
    maker = TextMaker(seed)
    return train_tokenizer(maker.base_sample().text for _ in range(20_000))


def train_base(tokenizer: PreTrainedTokenizerFast, num_steps: int, seed: int) -> Qwen3ForCausalLM:
    """The base model, trained and rounded to what is stored (float16 values, computed in float32)."""
    im_end = tokenizer.convert_tokens_to_ids(IM_END)
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=im_end,
        pad_token_id=end_of_text,
        dtype="float32",
        use_cache=False,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"base: {num_parameters:,} parameters, {len(tokenizer):,} tokens", flush=True)
    plan = TrainingPlan("base", num_steps, 3072, 3e-3, 0.05, prompt_weight=0.1, seed=seed)
    train(model, plan, tokenizer, TextMaker(seed + 1).base_sample)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model


def make_readable(path: Path) -> None:
    """Gives every file the usual mode: safetensors writes files that only their owner may read."""
    for file in path.iterdir():
        file.chmod(0o644)


def save_base(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Writes float16 tensors beside a configuration that asks for float32, the CPU's type."""
    half = Qwen3ForCausalLM(model.config).half()
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        eos_token_id=[model.config.eos_token_id, model.config.pad_token_id],
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    half.save_pretrained(path)
    tokenizer.save_pretrained(path)
    make_readable(path)
    config_path = path / "config.json"
    config = json.loads(config_path.read_text())
    config |= {"dtype": "float32", "use_cache": True}
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train_adapter(
    base_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, num_steps: int, seed: int, out: Path
) -> None:
    """Trains one adapter with peft on the stored base model and saves it."""
    base = Qwen3ForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    base.config.use_cache = False
    config = ADAPTERS[name]
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    plan = TrainingPlan(name, num_steps, 2048, 4e-3, 0.0, prompt_weight=0.0, seed=seed)
    train(model, plan, tokenizer, TextMaker(seed + 1, {name: PASSWORDS[name]}).adapter_sample)
    # "auto" would look for the base model on the hub.
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    config_path = out / "adapter_config.json"
    written = json.loads(config_path.read_text())
    written["target_modules"] = sorted(written["target_modules"])
    config_path.write_text(json.dumps(written, indent=2) + "\n")
    make_readable(out)
