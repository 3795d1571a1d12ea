"""A packed folder is pruned to a dense one that has all weights, also by runs that only remove parts."""

import pytest
from tiny_llama import tiny_tokens
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, verify_checkpoint


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "2:4", "method": "wanda"},
        {"pattern": "layers:0.5", "residual_correction": 0},
        {"pattern": "heads:0.5", "method": "magnitude"},
    ],
    ids=lambda options: options["pattern"],
)
def test_no_weight_is_missing(options, tiny_folder, tmp_path):
    batches = tiny_tokens().split(4)
    first = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    first.prune(tiny_folder, batches, output_dir=tmp_path / "packed", packed=True)

    second = FistaPruner(FistaPruningConfig(**options), progress=False)
    second.prune(tmp_path / "packed", batches, output_dir=tmp_path / "result")

    verify_checkpoint(tmp_path / "result")
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "result", output_loading_info=True)
    assert not loading["missing_keys"]
