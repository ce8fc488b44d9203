"""Facts about a compiled program, read from XLA: peak, buffers, collectives."""
