"""Every family of Transformers, without some of its channels, heads, experts and decoder layers."""

import copy

import pytest
from architectures import read_outcomes
from families import family_model, logits
from shrunken_models import assert_shrinks, generates_alike, parts_of, plan_for, some_groups

from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.removal.proof import require_same_outputs

TABLE = {
    family: outcome for family, outcome in read_outcomes().items() if outcome.status == "works"
}
GENERATES_OTHERWISE = (
    "glm_moe_dsa",
    "moshi",
    "prophetnet",
)  # with a cache than without; whole ones with some seeds
ALSO_LOSES = {
    "longcat_flash": ("channels", "heads"),
    "recurrent_gemma": ("channels",),
}  # as many as are asked here
KEEPS_ALL_LAYERS = """
    beam big_bird diffllama dory ernie4_5_moe gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified
    gemma4_unified_text inkling2_loop_text inkling2_text jamba longcat_flash minicpm3 modernbert-decoder olmo3
    olmo_hybrid prophetnet rwkv xlstm zamba zamba2 zaya
"""


def numbers_to_keep(model, kind):
    """Three quarters of the channels, one group of heads, one expert less, or one decoder layer less."""
    if kind == "layers":
        layers = list(range(len(find_decoder_layers(model))))
        # Of an lfm2_moe, only the first layer has attention.
        return layers[:-1] if model.config.model_type == "lfm2_moe" else layers[1:]
    found = parts_of(model, kind)
    return {
        "channels": found.groups * 3 // 4,
        "heads": 1,
        "experts": max(found.groups - 1, found.at_least),
    }[kind]


@pytest.mark.slow
@pytest.mark.parametrize("family", TABLE)
def test_a_family_loses_what_it_can_and_is_refused_what_it_can_not(family, tmp_path):
    whole = family_model(family)
    try:
        generates = family not in GENERATES_OTHERWISE and generates_alike(whole)
    except Exception:  # whatever a family raises that needs more than tokens to generate
        generates = False
    loses = {*TABLE[family].smaller, *ALSO_LOSES.get(family, ())}
    loses |= set() if family in KEEPS_ALL_LAYERS.split() else {"layers"}
    for kind in ("channels", "heads", "experts", "layers"):
        model = copy.deepcopy(whole)
        if kind in loses:
            again = assert_shrinks(model, tmp_path / kind, **{kind: numbers_to_keep(model, kind)})
            assert not generates or generates_alike(again)
        else:
            with pytest.raises(ValueError, match=r"no configuration describes|can't|does not r"):
                shrink_and_prove(model, kind)


def shrink_and_prove(model, kind):
    plan = plan_for(model, **{kind: numbers_to_keep(model, kind)})
    require_same_outputs(plan, "", model, some_groups(plan), logits)
