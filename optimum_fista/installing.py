"""How this package is installed: said here once, for messages and model cards, because no package index has it."""

NAME = "optimum-fista"


def install_command(extra: str = "", options: str = "") -> str:
    """Say what to run, and where, to install the package.

    Args:
        extra: One of the extras of pyproject.toml whose libraries are installed too, such as "datasets".
        options: Options of pip, such as "--editable".
    """
    target = f"'.[{extra}]'" if extra else "."
    command = " ".join(word for word in ("pip install", options, target) if word)
    return f"`{command}` in a clone of {NAME}"
