"""Pruning decoder layers: one after another, group by group of operators."""
