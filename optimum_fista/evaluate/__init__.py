"""Measures of a model and of a folder."""
