"""The parts of `benchmarks.executor`."""
