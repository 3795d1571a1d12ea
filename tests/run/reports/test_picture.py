import builtins
import io

import pytest

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.run.reports.picture import PICTURE_FILE, error_picture


@pytest.fixture
def without_matplotlib(monkeypatch):
    load = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return load(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_the_picture_is_saved_and_the_card_shows_it(saved):
    pytest.importorskip("matplotlib", reason="needs Matplotlib: pip install 'optimum-fista[plots]'")
    from PIL import Image

    data = (saved.folder / PICTURE_FILE).read_bytes()
    assert data == error_picture(saved.report)  # equal reports, equal bytes
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    assert "Software" not in image.info
    assert image.width > 300
    assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert f"]({PICTURE_FILE})\n\n| operator |" in (saved.folder / "README.md").read_text()


def test_without_matplotlib_there_is_none(saved, llama, tokens, tmp_path, without_matplotlib):
    assert error_picture(saved.report) is None
    pruner = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False)
    pruner.prune(llama, tokens.split(4))
    pruner.save_pretrained(llama, tmp_path / "saved")
    llama.save_pretrained(tmp_path / "dense")
    pruner.prune(tmp_path / "dense", tokens.split(4), output_dir=tmp_path / "streamed")
    for folder in ("saved", "streamed"):
        assert not (tmp_path / folder / PICTURE_FILE).exists()
        assert "![" not in (tmp_path / folder / "README.md").read_text()
