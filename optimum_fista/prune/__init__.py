"""The pruning of a model, one decoder layer after another."""
