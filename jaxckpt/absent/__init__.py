"""Compiling for a chip that is not there: the caller's side."""
