"""The parts of `benchmarks.update`."""
