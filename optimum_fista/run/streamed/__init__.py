"""Pruning from files to files: a decoder layer in memory at a time, resumed, spread over ranks."""
