"""The parts of `benchmarks.rivals`."""
