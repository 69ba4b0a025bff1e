"""The parts of scripts/train_demo.py: words, text, tokenizer, training, checks."""
