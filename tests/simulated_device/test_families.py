"""Every family that docs/architectures.md promises is streamed through a device to the result of the CPU."""

import warnings

import pytest
from architectures import read_table
from families import family_model, family_tokens, stacked_weights
from simulated_device.places import pruned_at, require_the_same

from optimum_fista import FistaPruner, FistaPruningConfig

WORKING = [family for family, outcome in read_table().items() if outcome.status == "works"]
SAMPLE = (
    "llama",
    "gpt2",
    "gptj",
    "gpt_neo",
    "codegen",
    "opt",
    "bloom",
    "falcon",
    "gemma4_text",
    "prophetnet",
    "deepseek_v3",
    "glm4_moe",
    "minimax",
    "mixtral",
)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in WORKING]
)
def test_streamed_as_on_the_cpu(family, tmp_path):
    model = family_model(family)
    config = FistaPruningConfig(
        pattern="2:4",
        method="wanda",
        error_correction=0.5,
        residual_correction=1.0,
        exclude=stacked_weights(model),
        starved_tokens=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of too few tokens, and of operators left dense
        found, report = pruned_at(
            "streamed, stored on the cpu", config, family_model(family), family_tokens(), tmp_path
        )
        FistaPruner(config, progress=False).prune(model, family_tokens())
    assert report.operators
    require_the_same(found, dict(model.named_parameters()))


def test_the_sample_is_of_working_families():
    assert set(SAMPLE) <= set(WORKING)
