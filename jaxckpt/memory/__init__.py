"""Memory of a compiled step, as XLA reports it."""
