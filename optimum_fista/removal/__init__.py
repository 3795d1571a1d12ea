"""Making a model smaller: channels, heads, experts, decoder layers and tokens are removed."""
