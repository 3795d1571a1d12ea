"""Edges: the command line, and its registration with optimum-cli."""
