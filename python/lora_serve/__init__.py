"""Serve hundreds of LoRA adapters from one base model."""
