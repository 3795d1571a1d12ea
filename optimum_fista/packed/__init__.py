"""Sparse weights stored as kept values and a mask, and linear layers that compute with this packed form.

Importing this package teaches Transformers to load packed folders.
"""

import optimum_fista.packed.quantizer  # noqa: F401  # registers its classes
