"""What is known of a model's files, and of the inside of Transformers."""
