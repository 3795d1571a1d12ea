"""Training under a mask."""
