"""Every family of Transformers, without some of its channels, heads, experts and decoder layers."""

import copy

import pytest
from families import FAMILIES, family_model, logits
from shrunken_models import assert_shrinks, generates_alike, some_groups

from optimum_fista.model.architecture import find_decoder_layers
from optimum_fista.model.parts import find_parts
from optimum_fista.model.shrinking import plan_shrinking, require_same_outputs

NOT_BUILT = """
    blt cpmant ctrl dots3_note gemma3n gemma4_assistant gemma4_unified_assistant hrm_text musicgen musicgen_melody
    openai-gpt reformer xlm xlnet
"""
NOT_LOADED = "emu3 mllama"  # by plain Transformers, whether pruned or not
GENERATES_OTHERWISE = ("glm_moe_dsa", "moshi", "prophetnet")  # with a cache than without; whole ones with some seeds
REFUSED = {
    "channels": {
        "changes as well": """
            cohere2_moe flex_olmo gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared
            inkling2_loop_text inkling2_text jamba jetmoe minimax minimax_m2 minimax_m3_vl_text mixtral olmoe
            phimoe
        """,
        "does not return the same": """
            gemma3n_text
        """,
        "no tensor of a decoder layer changes": """
            deepseek_v2 inkling_text lfm2 mellum qwen2_moe qwen3_moe qwen3_next
        """,
        "shares its weight": """
            zamba zamba2
        """,
        "states no number of them": """
            bloom dbrx gpt_neox_japanese kolibri1 lara_mini mamba2 mpt qwen3_5_moe qwen3_5_moe_text qwen4_exp
            qwen4_exp_text solar_open xlstm zaya
        """,
        "works on all inputs": """
            aria_text bitnet deepseek_v4 hunyuan_v1_moe llama4 llama4_text mamba
        """,
        "would have shape": """
            falcon_mamba
        """,
    },
    "heads": {
        "changes as well": """
            helium jetmoe laguna
        """,
        "does not run": """
            bitnet olmoe
        """,
        "does not take": """
            diffllama falcon
        """,
        "no tensor of a decoder layer changes": """
            bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom
            camembert codegen data2vec-text electra ernie git gpt-sw3 gpt2 gpt_neo gpt_neox gpt_neox_japanese
            gptj marian mbart megatron-bert modernbert-decoder mpt mvp opt pegasus plbart prophetnet rembert
            roberta roberta-prelayernorm roc_bert stablelm trocr whisper xglm xlm-roberta xlm-roberta-xl xmod
        """,
        "rows of one group can't be told": """
            gemma3n_text phi3 phi4_multimodal
        """,
        "shares its weight": """
            zamba zamba2
        """,
        "states no number of them": """
            falcon_mamba mamba mamba2 rwkv xlstm
        """,
        "there is a single one": """
            dbrx deepseek_v4 gpt_bigcode
        """,
        "works on all inputs": """
            flex_olmo inkling2_loop_text inkling2_text inkling_text minimax minimax_m2 olmo2 olmo3 olmo_hybrid
            zaya
        """,
        "would have shape": """
            doge fuyu persimmon recurrent_gemma roformer
        """,
    },
    "layers": {
        "does not take": """
            dory gemma3n_text olmo_hybrid prophetnet
        """,
        "instead of": """
            beam big_bird diffllama gemma3 gemma3_text gemma4 gemma4_text gemma4_unified gemma4_unified_text
            inkling2_loop_text inkling2_text minicpm3 olmo3 zaya
        """,
        "keeps shape None": """
            rwkv xlstm
        """,
        "shares its weight": """
            zamba zamba2
        """,
        "would become": """
            ernie4_5_moe jamba longcat_flash modernbert-decoder
        """,
    },
}
"""Families that are refused, by the reason. All others lose what is asked."""

EXPERTS = """
    afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1
    dots3_note_text ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe
    granitemoe_swa granitemoehybrid granitemoeshared hy_v3 hy_v4 inkling2_loop_text inkling2_text jamba
    kimi_linear kolibri1 laguna lara_mini lfm2_moe llama4 llama4_text mellum mimo_v2_flash minimax minimax_m2
    minimax_m3_vl_text mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next
    qwen4_exp qwen4_exp_text sarvam_mla sarvam_moe solar_open
"""
"""Families whose mixtures lose experts. All others are refused."""

BUILT = [family for family in FAMILIES if family not in f"{NOT_BUILT} {NOT_LOADED}".split()]


def reason_refused(family, kind):
    """Why a family can't lose something; `None` if it can."""
    if kind == "experts":
        return None if family in EXPERTS.split() else "can't lose experts"
    return next((reason for reason, families in REFUSED[kind].items() if family in families.split()), None)


def numbers_to_keep(model, kind):
    """Three quarters of the channels, one group of heads, one expert less, or one decoder layer less."""
    if kind == "layers":
        layers = list(range(len(find_decoder_layers(model))))
        return layers[:-1] if model.config.model_type == "lfm2_moe" else layers[1:]  # only its first one has attention
    found = find_parts(model, kind)
    return {"channels": found.groups * 3 // 4, "heads": 1, "experts": max(found.groups - 1, found.at_least)}[kind]


@pytest.mark.slow
@pytest.mark.parametrize("family", BUILT)
def test_a_family_loses_what_it_can_and_is_refused_what_it_can_not(family, tmp_path):
    whole = family_model(family)
    try:
        generates = family not in GENERATES_OTHERWISE and generates_alike(whole)
    except Exception:  # whatever a family raises that needs more than tokens to generate
        generates = False
    for kind in ("channels", "heads", "experts", "layers"):
        model, reason = copy.deepcopy(whole), reason_refused(family, kind)
        if reason is None:
            again = assert_shrinks(model, tmp_path / kind, **{kind: numbers_to_keep(model, kind)})
            assert not generates or generates_alike(again)
        else:
            with pytest.raises(ValueError, match=reason):
                shrink_and_prove(model, kind)


def shrink_and_prove(model, kind):
    plan = plan_shrinking(model, **{kind: numbers_to_keep(model, kind)})
    require_same_outputs(plan, "", model, some_groups(plan), logits)


def test_every_family_of_the_table_exists():
    listed = " ".join([NOT_BUILT, NOT_LOADED, EXPERTS, *(f for rows in REFUSED.values() for f in rows.values())])
    assert set(listed.split()) <= set(FAMILIES)
