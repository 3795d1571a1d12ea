"""Sparse weights stored by their kept values and a mask, and linear layers that compute with them as they are."""
