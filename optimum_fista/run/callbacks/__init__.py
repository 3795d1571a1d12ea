"""Callbacks for pruning runs, and trackers."""
