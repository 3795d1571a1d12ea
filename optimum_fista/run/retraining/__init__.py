"""Training a pruned model with its zeros kept."""
