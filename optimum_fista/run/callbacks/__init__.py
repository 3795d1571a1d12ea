"""Telling others of a run as it goes on."""
