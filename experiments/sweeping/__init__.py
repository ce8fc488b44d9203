"""A sweep's parts: its cases, the process that runs one, and the rows it leaves. No JAX import."""
