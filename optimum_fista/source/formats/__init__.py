"""Quantized formats: each file says how one of them is read as plain floating-point weights.

`format.py` has the interface. `dequantizer.py` loads a model in any of them. What a run does not change can be written
back as it was stored, without its format (`source_tensors`).
"""
