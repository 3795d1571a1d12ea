"""How good a saved model is: perplexity, generated text, verification."""
