"""Steps of one cell that beat the mathematics in ``preconditioners/`` by enough to be written again (``benchmarks/kernels.py``)."""
