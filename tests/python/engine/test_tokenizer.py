"""What a tokenizer tells clients about itself."""

from __future__ import annotations

import json

from transformers import AutoTokenizer

from engine.tokenizers_for_tests import byte_level_bpe
from lora_serve.engine.tokenizer import Tokenizer


def test_public_settings_are_json_without_the_places_of_files(tmp_path):
    backend = byte_level_bpe().copy().backend
    backend.chat_template = "{{ messages }}"
    backend.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    backend.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_pretrained(str(tmp_path))

    settings = tokenizer.public_settings()

    assert json.loads(json.dumps(settings)) == settings
    assert str(tmp_path) not in json.dumps(settings)
    assert not [name for name in settings if name.endswith("_file") or "path" in name]
    expected = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "unk_token": None}
    assert {name: settings[name] for name in expected} == expected
    assert settings["chat_template"] == "{{ messages }}"
    assert "<tool>" in json.dumps(settings)
    assert settings["tokenizer_class"] == type(AutoTokenizer.from_pretrained(tmp_path)).__name__


def test_public_settings_of_a_model_without_a_chat_template_have_none():
    assert "chat_template" not in byte_level_bpe().public_settings()
