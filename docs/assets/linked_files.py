"""Files beside `docs` that pages link to become files of the site, so that a link works there as on GitHub."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_PATTERNS = ("benchmarks/results/*.json", "benchmarks/tasks/*.yaml", "examples/*.py")
_LINK = re.compile(r"\]\(\.\./((?:\.\./)*(?:benchmarks/(?:results|tasks)|examples)/)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them to the site."""
    root = Path(config.docs_dir).parent
    for path in sorted(path for pattern in _PATTERNS for path in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links out of `docs` lead to them: `../examples/a.py` becomes `examples/a.py`."""
    return _LINK.sub(r"](\1", markdown)
