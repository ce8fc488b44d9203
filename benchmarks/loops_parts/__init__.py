"""The processes of `benchmarks.loops`."""
