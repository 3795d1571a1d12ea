"""How fast pruned models run, dense and packed."""
