"""Model folders: read, written, packed, pushed."""
