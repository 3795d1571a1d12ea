"""optimum-fista under the name where Optimum's packages are looked for."""

from optimum_fista import __all__, __getattr__, __version__  # noqa: F401
