"""Measuring models and verifying folders."""
