"""Model folders in the packed format: writing, loading, unpacking."""
