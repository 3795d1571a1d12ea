"""Texts, and the windows of tokens made from them."""
