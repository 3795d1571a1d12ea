"""A pruned model folder as one HTML page that needs nothing else: no network, no scripts, no fonts."""
