"""The parts of `benchmarks.functions`."""
