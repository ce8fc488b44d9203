"""The report's parts: reading rows, grouping them, the page and the figure. No JAX import."""
