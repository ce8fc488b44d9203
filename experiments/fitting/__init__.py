"""Rows and tables of `experiments.fit`."""
