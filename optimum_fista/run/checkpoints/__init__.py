"""Model folders: loading, saving, replacing."""
