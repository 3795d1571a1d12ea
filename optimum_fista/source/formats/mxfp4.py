"""MXFP4: experts with 4 bits a value and a scale for every 32 values, as gpt-oss is published.

The files hold `X_blocks`, bytes [experts, out, in / 32, 16] with two values each, and `X_scales`, bytes
[experts, out, in / 32] with exponents, for the parameter `X` [experts, in, out]. Transformers has all that it takes.
"""

from optimum_fista.source.formats.format import QuantizedFormat


class MXFP4(QuantizedFormat):
    """Experts in 4 bits; other weights are dense."""

    method = "mxfp4"
