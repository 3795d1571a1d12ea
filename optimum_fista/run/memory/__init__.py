"""Memory: what is free, what was held, what is given back."""
