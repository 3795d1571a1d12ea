"""How this package is installed: said here once, for messages and model cards, because no package index has it."""

NAME = "optimum-fista"


def install_command(extra: str = "", options: str = "") -> str:
    """Return a text that says what to run, and where, to install the package. Installs nothing.

    Args:
        extra: One of the extras of pyproject.toml whose libraries are installed too, such as "datasets".
        options: Options of pip, such as "--editable".
    """
    target = f"'.[{extra}]'" if extra else "."
    parts = ["pip install", options, target]
    command = " ".join(part for part in parts if part)
    return f"`{command}` in a clone of {NAME}"
