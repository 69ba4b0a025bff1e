"""LoRA operators and their references; imports nothing internal."""
