"""Plans: what a run would take, from the configuration of a model alone."""
