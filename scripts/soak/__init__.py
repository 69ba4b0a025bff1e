"""The parts of the soak tests, `scripts/soak_cuda.py` and `scripts/soak_server.py`."""
