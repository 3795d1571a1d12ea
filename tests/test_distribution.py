"""What is packed into the wheel and the source archive, by setuptools itself, is what lies in the tree."""

import contextlib
from pathlib import Path

import pytest
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("optimum_fista", "optimum")
AROUND = {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[set[str], set[str]]:
    """Files of the wheel, and files of the source archive; no file is written into the tree."""
    egg_base = str(tmp_path_factory.mktemp("egg"))
    with contextlib.chdir(ROOT):
        distribution = Distribution({"script_name": "setup.py"})
        distribution.parse_config_files(["pyproject.toml"])
        egg_info = distribution.get_command_obj("egg_info")
        egg_info.egg_base = egg_base
        distribution.run_command("egg_info")
        build = distribution.get_command_obj("build_py")
        build.ensure_finalized()
        wheel = set(build.get_output_mapping().values())
        archive = {name for name in egg_info.filelist.files if ".egg-info" not in name}
    return {Path(name).as_posix() for name in wheel}, {Path(name).as_posix() for name in archive}


def in_tree() -> set[str]:
    """Files of the packages, less what Python leaves beside them."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    names = (path.relative_to(ROOT).as_posix() for path in files)
    return {name for name in names if "__pycache__" not in name}


def test_the_wheel_has_all_files_of_the_packages_and_the_archive_those_around_them_too(packed):
    wheel, archive = packed

    assert wheel == in_tree()
    assert archive == wheel | AROUND
    for name in ("py.typed", "folder/card.md", "page/style.css"):
        assert f"optimum_fista/{name}" in wheel
    assert "optimum/commands/register/register_fista.py" in wheel
