"""Runs: the pruner, reports, saved checkpoints, texts and evaluation."""
