"""The parts of the engine's soak test, `scripts/soak_cuda.py`."""
