"""Mathematics: patterns, the layer problem, solvers and pruning methods. Imports torch and NumPy only."""
