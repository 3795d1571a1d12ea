from pathlib import Path

import pytest

from optimum_fista.text.one_text import require_different, require_held_out


def test_pydoc_is_refused_as_calibration_and_measured_text_at_once():
    message = "^--measure or --protect: 'pydoc' is among the calibration text"
    with pytest.raises(ValueError, match=message):
        require_held_out(["pydoc"], ["c4", "pydoc"])
    require_held_out(["wikitext2"], ["wikitext2"])  # which has two splits


def test_a_copy_of_the_calibration_text_is_not_held_out(tmp_path):
    sky, sea, copy = (str(tmp_path / name) for name in ("sky.txt", "sea.txt", "copy.txt"))
    Path(sky).write_text("the sky")
    Path(sea).write_text("the sea")
    Path(copy).write_text("the sea")

    with pytest.raises(ValueError, match=r"copy\.txt' is among the calibration text"):
        require_held_out([copy], [sky, sea])
    require_held_out([copy], [sky])


def test_one_file_by_two_paths_is_one_text(tmp_path):
    (tmp_path / "sea.txt").write_text("the sea")
    (tmp_path / "sky.txt").write_text("the sky")
    (tmp_path / "link.txt").symlink_to("sea.txt")
    sea, sky, link = (str(tmp_path / name) for name in ("sea.txt", "sky.txt", "link.txt"))

    with pytest.raises(ValueError, match=r"has the text '.*link\.txt' twice: pass it once"):
        require_different([sea, sky, link])
    require_different([sea, sky])


@pytest.mark.parametrize(
    ("measured", "calibrated", "is_refused"),
    [
        ("owner/name:test", "owner/name:test", True),
        ("owner/name:test:text", "owner/name:test", True),
        ("owner/name:train", "owner/name", True),
        ("owner/name:train_sft", "owner/name", True),
        ("owner/name:test", "owner/name", False),
        ("owner/name", "owner/name", False),  # other rows are measured
        ("owner/other:train", "owner/name", False),
    ],
)
def test_a_split_that_is_calibrated_on_is_not_measured(measured, calibrated, is_refused):
    if is_refused:
        with pytest.raises(ValueError, match="is among the calibration text"):
            require_held_out([measured], [calibrated])
    else:
        require_held_out([measured], [calibrated])
