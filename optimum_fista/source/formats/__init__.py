"""Quantized formats: each is read as plain floating-point weights, and written back as it was stored."""
