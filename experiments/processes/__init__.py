"""Several processes as one run: their flags, how they join, how they stay connected."""
