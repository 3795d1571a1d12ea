"""What a run will take, before it begins: memory, disk and time."""
