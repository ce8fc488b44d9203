"""The training run: data, step, loop, record, checkpoints."""
