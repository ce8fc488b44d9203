"""Compiling for a chip that this machine does not have: the caller's side."""
