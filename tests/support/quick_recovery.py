"""Options of the quick recoveries that tests run."""

QUICK = {
    "tokens": 640,
    "sequence_length": 16,
    "batch_size": 1,
    "accumulate": 2,
    "held_out": 4,
    "relative_step": 0.1,
    "device": "cpu",
    "compute_dtype": "float32",
    "progress": False,
}
"""Of a recovery of 20 steps on 40 sequences of the tiny model."""
