"""Decoder models and their checkpoints."""
