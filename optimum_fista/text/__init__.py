"""Text and tokens to calibrate and to evaluate on."""
