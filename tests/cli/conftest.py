from pathlib import Path

import pytest
from tiny_llama import QUICK, TEXT

from optimum_fista.cli.main import main


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sea.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def pruned_folder(tiny_folder, text_file, tmp_path_factory) -> Path:
    """The model pruned to 2:4 by Wanda; do not write to it."""
    folder = tmp_path_factory.mktemp("pruned") / "model"
    arguments = [
        "prune",
        str(tiny_folder),
        "-o",
        str(folder),
        "--pattern",
        "2:4",
        "--method",
        "wanda",
        *QUICK,
    ]
    assert main([*arguments, "--calibration", str(text_file)]) == 0
    return folder
