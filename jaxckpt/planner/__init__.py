"""The planner: bytes in, the fastest step that fits out; see `fit`."""
