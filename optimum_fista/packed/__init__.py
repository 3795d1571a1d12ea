"""Sparse weights stored as kept values and a mask.

Importing this package teaches Transformers to load packed folders.
"""

import optimum_fista.packed.quantizer  # noqa: F401  # registers its classes
