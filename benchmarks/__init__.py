"""Commands that measure what the documentation states; each writes what it printed as JSON."""
