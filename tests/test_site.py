"""The documentation builds without warnings, of which a link that leads nowhere is one."""

import os
import re
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from doc_pages import ROOT

pytest.importorskip("mkdocs", reason="needs MkDocs: pip install 'optimum-fista[docs]'")


def test_the_site_has_commands_and_docstrings_and_loads_nothing_from_the_network(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]

    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    assert built.returncode == 0, built.stderr
    assert "--error-correction" in (tmp_path / "commands.html").read_text()
    assert 'id="optimum_fista.FistaPruner.prune"' in (tmp_path / "api.html").read_text()
    pages = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    loaded = re.findall(
        r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', pages
    )
    assert len(loaded) > 20  # so the pattern finds what pages load
    assert [source for source in loaded if urlsplit("".join(source)).netloc] == []
