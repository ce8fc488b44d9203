"""The planner: from a budget in bytes to the fastest step that fits; see `fit`."""
