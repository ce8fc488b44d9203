"""What XLA says of a compiled program."""
