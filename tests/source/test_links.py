"""Links that lead out of a model folder are not followed."""

from pathlib import Path

import pytest

from optimum_fista.source.links import leads_out


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "LICENSE").write_text("free")
    (folder / "sub" / "a.jinja").write_text("a")
    (tmp_path / "secret").write_text("key")
    return folder


def test_files_and_links_that_stay_inside_belong_to_the_folder(folder):
    (folder / "NOTICE").symlink_to("LICENSE")
    (folder / "other").symlink_to("sub", target_is_directory=True)

    for name in ("LICENSE", "NOTICE", "sub", "sub/a.jinja", "other/a.jinja"):
        assert not leads_out(folder / name, folder)


def test_links_out_of_the_folder_and_broken_links_do_not_belong_to_the_folder(folder, tmp_path):
    (folder / "NOTICE").symlink_to(tmp_path / "secret")
    (folder / "beside").symlink_to(tmp_path, target_is_directory=True)
    (folder / "self").symlink_to("self")
    (folder / "nothing").symlink_to("nowhere")

    for name in ("NOTICE", "beside", "beside/secret", "self", "nothing"):
        assert leads_out(folder / name, folder)


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)

    assert not leads_out(link / "LICENSE", link)


def test_links_of_the_hub_cache_are_files_of_the_model(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    blobs = tmp_path / "models--a--b" / "blobs"
    other = tmp_path / "models--c--d" / "blobs"
    for place in (snapshot, blobs, other):
        place.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (other / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "foreign.json").symlink_to(other / "abc")

    assert not leads_out(snapshot / "config.json", snapshot)
    assert leads_out(snapshot / "foreign.json", snapshot)
