"""Costs of a traced function: residuals, FLOPs, bytes moved, seconds. Nothing is compiled."""
