import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from optimum_fista.folder.output import errors_of_writing, write_file


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path):
    file = tmp_path / "table.json"
    file.write_text("old")
    (tmp_path / ".table.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/table\.json'$") as caught:
        write_file(file, "new")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["table.json"]
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    ("text", "number"),
    [("I/O error: No space left on device (os error 28)", errno.ENOSPC), ("invalid header", errno.EIO)],
)
def test_errors_of_safetensors_are_errors_of_the_system(tmp_path, text, number):
    with pytest.raises(OSError, match=r"serializing.*: '.*/model'") as caught, errors_of_writing(tmp_path / "model"):
        raise SafetensorError(f"Error while serializing: {text}")
    assert caught.value.errno == number


def test_a_name_that_an_error_has_stays(tmp_path):
    with pytest.raises(OSError, match="another"), errors_of_writing(tmp_path):
        raise OSError(errno.ENOSPC, "full", "another")
