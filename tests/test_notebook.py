"""The notebook runs from its first cell to its last, on a tiny model and with a stand-in of the Hub."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from hub_standin import HubStandIn, connect
from tiny_llama import TEXT, save_tiny_folder

from optimum_fista.evaluate.verification import verify_checkpoint

CELLS = json.loads((Path(__file__).parents[1] / "examples" / "quickstart.ipynb").read_text())["cells"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny_folder(Path("model"))
    Path("sea.txt").write_text(TEXT)
    settings = {"MODEL": "model", "CALIBRATION": "self", "SAMPLES": "8", "LENGTH": "16", "TEXT": "sea.txt"}
    for name, value in (settings | {"RECOVER": "160", "REPO": "tester/small"}).items():
        monkeypatch.setenv(name, value)
    shown: list[str] = []
    display = SimpleNamespace(Image=lambda file, width: shown.append(file))  # Jupyter's own; no need to install it
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    names: dict[str, object] = {}
    with HubStandIn() as hub:
        connect(hub, monkeypatch)
        for cell in CELLS:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        assert "model.safetensors" in hub.files("tester/small")
    printed = capsys.readouterr().out
    assert "7,680 of 15,360 weights zero" in printed
    assert printed.count(": perplexity ") == 3
    assert "on 160 tokens of" in printed
    assert f"{hub.endpoint}/tester/small/commit/" in printed
    assert [Path(file).is_file() for file in shown] == [True]
    assert verify_checkpoint(Path("pruned")).num_zeros == verify_checkpoint(Path("recovered")).num_zeros == 7680
