"""Sparse weights stored by their kept values and a mask, and linear layers that compute with them as they are.

Importing this package teaches Transformers to load packed folders.
"""

import optimum_fista.packed.quantizer  # noqa: F401  # registers its classes
