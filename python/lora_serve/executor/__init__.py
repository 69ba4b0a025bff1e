"""Runs a plan of the scheduler: input tensors, model, sampling."""
