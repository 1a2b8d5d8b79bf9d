"""Speed and memory, each beside the bare work inside it: ``python -m benchmarks NAME``."""
