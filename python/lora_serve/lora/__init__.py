"""Adapter files, names, generations and memory."""
