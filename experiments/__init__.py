"""Command-line experiments: thin programs over the jaxckpt library."""
