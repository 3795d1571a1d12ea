"""How this package is installed: said here once, for messages and model cards, because no package index has it."""

NAME = "optimum-fista"


def install_command(extra: str = "", options: str = "") -> str:
    """What to run, and where, for the package with the libraries of one of its extras."""
    what = f"'.[{extra}]'" if extra else "."
    return f"`pip install {f'{options} ' if options else ''}{what}` in a clone of {NAME}"
