"""A packed folder is pruned to a dense one that has all weights, also by runs that only remove parts."""

import pytest
from tiny_llama import QUICK, TEXT, tiny_tokens
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, verify_checkpoint
from optimum_fista.cli.main import main
from optimum_fista.folder.checkpoint import read_report


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "2:4", "method": "wanda"},
        {"pattern": "layers:0.5", "residual_correction": 0},
        {"pattern": "heads:0.5", "method": "magnitude"},
    ],
    ids=lambda options: options["pattern"],
)
def test_a_model_pruned_from_a_packed_folder_misses_no_weight(options, tiny_folder, tmp_path):
    batches = tiny_tokens().split(4)
    first = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    first.prune(tiny_folder, batches, output_dir=tmp_path / "packed", packed=True)

    second = FistaPruner(FistaPruningConfig(**options), progress=False)
    second.prune(tmp_path / "packed", batches, output_dir=tmp_path / "result")

    verify_checkpoint(tmp_path / "result")
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "result", output_loading_info=True)
    assert not loading["missing_keys"]


@pytest.mark.parametrize("pattern", ["2:4", "channels:0.25/4"])
@pytest.mark.filterwarnings("ignore:the model was pruned before")
def test_the_command_takes_a_packed_folder(pattern, tiny_folder, tmp_path, capsys):
    packed = str(tmp_path / "packed")
    output = tmp_path / "result"
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    flags = ["--method", "wanda", "--calibration", str(text), *QUICK]
    assert main(["prune", str(tiny_folder), "-o", packed, "--packed", *flags]) == 0
    command = ["prune", packed, "-o", str(output), "--pattern", pattern, *flags]

    assert main([*command, "--dry-run"]) == 0
    assert main(command) == 0

    assert "quantized" not in capsys.readouterr().err
    assert verify_checkpoint(output).num_parameters == read_report(output).model["num_parameters"]
    AutoModelForCausalLM.from_pretrained(output)
