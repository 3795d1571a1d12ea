"""Callbacks for pruning runs."""
