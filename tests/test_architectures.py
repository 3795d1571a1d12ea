"""Every family of Transformers with a causal language model, against what docs/architectures.md promises."""

import importlib.metadata
import re
from dataclasses import replace

import pytest
from architectures import COMMAND, PAGE, format_page, read_outcomes
from families import FAMILIES, try_experts, try_family, what_can_go
from packaging.version import parse

TABLE, MULTIMODAL_TABLE = read_outcomes(), read_outcomes(multimodal=True)
EXPERTS_TRIED = [(o.family, o.multimodal) for o in TABLE.values() if o.experts]
EXPERTS_TRIED += [(o.family, o.multimodal) for o in MULTIMODAL_TABLE.values() if o.experts]
EXPERTS_TRIED_ALWAYS = (
    ("dbrx", False),
    ("deepseek_v4", False),
    ("doge", False),
    ("ernie4_5_vl_moe", True),
    ("gemma4_text", False),
    ("hunyuan_v1_moe", False),
    ("inkling_text", False),
    ("jetmoe", False),
    ("longcat_flash", False),
    ("minimax_m3_vl", True),
    ("zaya", False),
)
WRITTEN_WITH = re.search(r"^transformers (\S+):", PAGE.read_text(), re.MULTILINE)[1]
pytestmark = pytest.mark.skipif(
    parse(importlib.metadata.version("transformers")) < parse(WRITTEN_WITH),
    reason="the page is of a newer version",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_outcome_that_the_page_promises(family, tmp_path):
    outcome = try_family(family, tmp_path / "model")

    promised = TABLE.get(family)
    if promised is None:
        pytest.skip(
            f"not in docs/architectures.md ({outcome.status}: {outcome.reason}); run {COMMAND}"
        )
    assert (outcome.model_class, outcome.status) == (promised.model_class, promised.status), (
        outcome.reason
    )
    assert outcome.dense == promised.dense
    if outcome.status != "not built":  # those are words of Transformers, which may change
        assert outcome.reason == promised.reason


@pytest.mark.parametrize("family", [*FAMILIES[::24], "opt", "mixtral", "gemma3n_text"])
def test_parts_that_can_be_removed_from_a_family_are_those_on_the_page(family):
    if family in TABLE and TABLE[family].status == "works":
        assert what_can_go(family) == TABLE[family].smaller


@pytest.mark.parametrize(
    "family",
    [
        "qwen3_vl_moe",
        "mistral3",
        "molmo2",
        "idefics3",
        "blip-2",
        "kosmos-2",
        "step3p7",
        "minimax_m3_vl",
    ],
)
def test_a_multimodal_family_has_the_outcome_that_the_page_promises(family, tmp_path):
    promised = MULTIMODAL_TABLE[family]
    outcome = try_family(family, tmp_path / "model", multimodal=True)
    assert replace(outcome, smaller=promised.smaller, experts=promised.experts) == promised


@pytest.mark.parametrize(
    ("family", "multimodal"),
    [
        pytest.param(
            *case, marks=() if case in EXPERTS_TRIED_ALWAYS else pytest.mark.slow, id=case[0]
        )
        for case in EXPERTS_TRIED
    ],
)
def test_experts_can_be_removed_from_the_families_on_the_page(family, multimodal, tmp_path):
    promised = (MULTIMODAL_TABLE if multimodal else TABLE)[family]

    assert try_experts(family, tmp_path, multimodal=multimodal) == promised.experts


def test_parts_that_can_be_removed_from_a_multimodal_family_are_those_on_the_page():
    assert what_can_go("qwen3_vl_moe", multimodal=True) == MULTIMODAL_TABLE["qwen3_vl_moe"].smaller


def test_readme_and_page_count_the_families_that_work():
    works, multimodal = (
        sum(o.status == "works" for o in table.values()) for table in (TABLE, MULTIMODAL_TABLE)
    )
    readme = " ".join((PAGE.parents[1] / "README.md").read_text().split())
    assert f"{works} of the {len(TABLE)} families of causal language models" in readme
    assert f"{multimodal} of {len(MULTIMODAL_TABLE)} multimodal ones" in readme
    assert (
        format_page(TABLE.values(), MULTIMODAL_TABLE.values()).partition(": ")[2]
        in PAGE.read_text()
    )
