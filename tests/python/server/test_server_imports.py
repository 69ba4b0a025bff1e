"""What the server's own process does without: torch, which takes seconds to import and 300 MB of memory."""

from __future__ import annotations

import json
import subprocess
import sys

from lora_serve.engine.tokenizer import Tokenizer
from support.tiny_checkpoint import make_tiny_checkpoint

MODULES = """
import sys
import lora_serve.cli.main
import lora_serve.server.launch
print("torch" in sys.modules)
"""
TOKENIZER = """
import json, sys
from lora_serve.engine.tokenizer import Tokenizer
from lora_serve.server.launch import leave_torch_out
leave_torch_out()
tokenizer = Tokenizer.from_pretrained(sys.argv[1])
text, messages = json.loads(sys.argv[2])
print(json.dumps([
    sys.modules["torch"] is None,
    tokenizer.encode(text),
    tokenizer.encode_chat(messages),
    tokenizer.copy().decode(tokenizer.encode(text)),
    tokenizer.public_settings(),
]))
"""


def run(program, *arguments):
    """What a process of its own prints; it says nothing on stderr."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_modules_of_the_server_import_no_torch():
    assert run(MODULES).split() == ["False"]


def test_a_tokenizer_is_the_same_without_torch(tmp_path):
    model = make_tiny_checkpoint(tmp_path / "model")
    text, messages = "Grüße, 世界!", [{"role": "user", "content": "hello"}]
    tokenizer = Tokenizer.from_pretrained(str(model))
    assert json.loads(run(TOKENIZER, model, json.dumps([text, messages]))) == [
        True,
        tokenizer.encode(text),
        tokenizer.encode_chat(messages),
        text,
        tokenizer.public_settings(),
    ]
