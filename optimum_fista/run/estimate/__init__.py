"""What a run will take: its operators, memory, time and disk."""
