"""Mixtures whose router reads the experts of a token from a table (DeepSeek-V4 in its first decoder layers)."""

import copy
import json
import shutil

import pytest
import torch
from families import family_tokens, logits
from folder_files import files_of
from killed import Killed, killed_at_write
from quantized_models import with_experts_in_fp8
from safetensors.torch import load_file, save_file
from shrunken_config import VOCAB_SIZE, shrunken_config
from tiny_models import random_table, randomize
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.correction import Correction, LayerTargets
from optimum_fista.model.inputs import HiddenStates, LayerActivations, record_inputs
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.removal.experts import experts_of
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.removal.routing_table import KeptExperts, repointed
from optimum_fista.removal.shrinking import plan_shrinking
from optimum_fista.removal.smaller_modules import shrink_model
from optimum_fista.removal.substitutes import choose_substitutes
from optimum_fista.source.stored_tensor import read_stored

pytestmark = [
    # Warnings of few tokens, and of layers without residual correction.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("no_gradients"),
]
CPU = torch.device("cpu")
NUM_EXPERTS = 8
TABLES = ("model.layers.0.mlp.gate.tid2eid", "model.layers.1.mlp.gate.tid2eid")


def tiny_deepseek_v4(**options):
    """A random model with two mixtures that have a table, and one that has none: 3 of 8 experts for each token."""
    config = shrunken_config("deepseek_v4")
    config.update(
        {
            "n_routed_experts": NUM_EXPERTS,
            "num_experts_per_tok": 3,
            "mlp_layer_types": ["hash_moe", "hash_moe", "moe"],
            **options,
        }
    )
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, generator)
    return model


def prune(model, output=None, batches=None, **options):
    """Remove half of the experts, in memory or from a folder to `output`; returns the pruner and its report."""
    options = {"pattern": "experts:0.5", **options}
    pruner = FistaPruner(FistaPruningConfig(**options), progress=False)
    if batches is None:
        # Two texts: experts are refitted to several only.
        batches = [
            {"input_ids": ids, "source": name}
            for ids, name in zip(family_tokens(), "ab", strict=True)
        ]
    where = {} if output is None else {"output_dir": output}
    return pruner, pruner.prune(model, batches, **where)


def slow_repointed(table, num_experts, kept, substitutes):
    """What `repointed` returns, row by row in plain Python."""
    removed = [expert for expert in range(num_experts) if expert not in kept]
    choices = dict(zip(removed, substitutes, strict=True))
    rows = []
    for old in table.tolist():
        row = list(old)
        for place, expert in enumerate(old):
            if expert in choices:
                row[place] = next(choice for choice in choices[expert] if choice not in row)
        rows.append([kept.index(expert) for expert in row])
    return torch.tensor(rows, dtype=table.dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_entries_of_removed_experts_get_the_best_substitute_that_their_row_lacks(dtype):
    generator = torch.Generator().manual_seed(3)
    table = random_table(200, 3, NUM_EXPERTS, generator).to(dtype)
    before = table.clone()
    kept = [1, 2, 5, 6]
    substitutes = [
        [kept[place] for place in torch.randperm(4, generator=generator)[:3]] for _ in range(4)
    ]

    result = repointed(table, NUM_EXPERTS, KeptExperts(kept, substitutes))

    assert result.dtype == dtype
    assert torch.equal(result, slow_repointed(table, NUM_EXPERTS, kept, substitutes))
    assert all(len(set(row)) == 3 for row in result.tolist())
    assert torch.equal(table, before)


def test_without_substitutes_the_first_kept_experts_replace_the_others():
    table = torch.tensor([[0, 1], [3, 2], [2, 0]])

    result = repointed(table, 4, (1, 2))

    assert result.tolist() == [[1, 0], [0, 1], [1, 0]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model and what a run from files makes of it, with its report."""
    folder = tmp_path_factory.mktemp("tables")
    tiny_deepseek_v4().save_pretrained(folder / "dense")
    _, report = prune(folder / "dense", folder / "smaller")
    return folder / "dense", folder / "smaller", report


def test_a_smaller_model_loads_in_transformers_and_its_tables_name_kept_experts(folders):
    dense, smaller, report = folders
    dense_tensors = AutoModelForCausalLM.from_pretrained(dense).state_dict()

    model, info = AutoModelForCausalLM.from_pretrained(smaller, output_loading_info=True)

    assert not any(info.values())
    assert model.config.n_routed_experts == 4
    tensors = model.state_dict()
    for name, mixture in zip(TABLES, report.mixtures, strict=False):
        table = tensors[name]
        old = dense_tensors[name]
        assert table.shape == old.shape
        assert table.dtype == old.dtype
        assert set(table.unique().tolist()) <= set(range(4))
        assert all(len(set(row)) == 3 for row in table.tolist())
        # entries of experts that stay are still theirs
        for new_number, expert in enumerate(mixture.groups_kept):
            assert bool((table[old == expert] == new_number).all())
        assert len(mixture.substitutes) == 4
    assert report.mixtures[2].substitutes == ()
    assert verify_checkpoint(smaller, dense=dense).num_mixtures == 3


@pytest.mark.parametrize("refit", [True, False])
def test_a_run_from_files_gives_what_one_in_memory_gives(refit, folders, tmp_path):
    dense, _, _ = folders
    model = tiny_deepseek_v4()

    pruner, in_memory = prune(model, expert_refit=refit)
    pruner.save_pretrained(model, tmp_path / "memory")
    _, streamed = prune(dense, tmp_path / "streamed", expert_refit=refit)

    assert [m.groups_kept for m in streamed.mixtures] == [m.groups_kept for m in in_memory.mixtures]
    assert [m.substitutes for m in streamed.mixtures] == [m.substitutes for m in in_memory.mixtures]
    for folder in ("memory", "streamed"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        tensors = loaded.state_dict()
        assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
        # a copy, because loaded tensors lie unaligned in memory, where products may differ in the last bit
        assert torch.equal(logits(copy.deepcopy(loaded)), logits(model))
        assert verify_checkpoint(tmp_path / folder, dense=dense).num_equal


def test_a_killed_run_resumes_to_the_same_bytes(folders, tmp_path):
    dense, smaller, _ = folders

    with pytest.raises(Killed), killed_at_write(10):
        prune(dense, tmp_path / "smaller")
    finished = list((tmp_path / "smaller.unfinished" / "journal").glob("layer-*.json"))
    assert 0 < len(finished) < 3
    prune(dense, tmp_path / "smaller")

    assert files_of(tmp_path / "smaller") == files_of(smaller)


def test_a_table_in_the_files_keeps_its_dtype(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "dense")
    name = _change_table(tmp_path / "dense", lambda table: table.to(torch.int32))

    prune(tmp_path / "dense", tmp_path / "smaller", expert_refit=False)

    tensors = {}
    for file in (tmp_path / "smaller").glob("*.safetensors"):
        tensors |= load_file(file)
    assert tensors[name].dtype == torch.int32
    verify_checkpoint(tmp_path / "smaller", dense=tmp_path / "dense")


def test_experts_in_fp8_stay_so_and_the_table_names_those_that_stay(tmp_path):
    source = with_experts_in_fp8(tmp_path / "source", tiny_deepseek_v4())

    _, report = prune(source, tmp_path / "smaller", expert_refit=False)

    before = read_stored(source)
    after = read_stored(tmp_path / "smaller")
    mixture = report.mixtures[0]
    for new_number, expert in enumerate(mixture.groups_kept):
        for weight in ("w1.weight", "w2.weight_scale_inv"):
            stored = after[f"model.layers.0.ffn.experts.{new_number}.{weight}"]
            assert stored.equals(before[f"model.layers.0.ffn.experts.{expert}.{weight}"])
    assert int(after["model.layers.0.ffn.gate.tid2eid"].tensor().max()) == 3
    assert verify_checkpoint(tmp_path / "smaller", dense=source).num_equal


def _change_table(folder, change):
    """Change the first table in a folder's files by a function; returns its name there."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("0.ffn.gate.tid2eid") or name == TABLES[0]:
                tensors[name] = change(tensors[name]).contiguous()
                save_file(tensors, file, metadata={"format": "pt"})
                return name
    raise AssertionError("no table in the files")


@pytest.mark.parametrize("removed_layers", ["", "+layers:0.25"])
def test_tokens_that_were_not_sent_to_a_removed_expert_are_no_obstacle(removed_layers):
    """The calibration text has three tokens only, so most experts with a table get none."""
    model = tiny_deepseek_v4(
        num_hidden_layers=4,
        mlp_layer_types=["hash_moe", "hash_moe", "moe", "moe"],
        layer_types=["sliding_attention"] * 4,
    )
    batches = [torch.tensor([[5, 6, 7, 5, 6, 7, 7, 5] * 4])]

    _, report = prune(model, batches=batches, pattern="experts:0.5" + removed_layers)

    with_table = [mixture for mixture in report.mixtures if mixture.substitutes]
    assert with_table
    assert any(0 in mixture.expert_tokens for mixture in with_table)
    assert bool(torch.isfinite(logits(model)).all())


def layer_targets(model, batches):
    """The first mixture of a model, its experts, and what its decoder layer should return."""
    layers = find_decoder_layers(model)
    outline = ModelOutline(layers)
    part = outline.parts("experts").parts[0]
    name, layer = next(iter(layers))
    recorded = record_inputs(layers, read_batches(batches, 64))
    activations = LayerActivations(
        layer, recorded.calls[0], recorded.token_masks, CPU, recorded.held_out
    )
    experts = experts_of(part, name, layer)
    hidden = list(recorded.hidden_states)
    targets = LayerTargets(
        activations,
        [],
        Correction("full"),
        HiddenStates(hidden, hidden),
        experts=experts.module,
    )
    return outline, part, name, experts, targets


def test_a_copy_of_a_removed_expert_is_its_best_substitute_and_the_output_stays():
    model = tiny_deepseek_v4(
        num_hidden_layers=2,
        mlp_layer_types=["hash_moe", "moe"],
        layer_types=["sliding_attention"] * 2,
    )
    mlp = model.model.layers[0].mlp
    copy_of = torch.tensor([0, 1, 2, 3, 2, 0, 3, 1])  # of the last four experts
    with torch.no_grad():
        for tensor in (mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight):
            tensor.copy_(tensor[copy_of])
    # rows that name no expert together with its copy
    table = torch.rand(VOCAB_SIZE, 4, generator=torch.Generator().manual_seed(5)).argsort(1)[:, :3]
    copies = torch.tensor([5, 7, 4, 6])
    is_copy = torch.rand(table.shape, generator=torch.Generator().manual_seed(6)) < 0.5
    mlp.gate.tid2eid.copy_(torch.where(is_copy, copies[table], table))
    outline, part, name, experts, targets = layer_targets(model, family_tokens())
    kept = (0, 1, 2, 3)

    substitutes = choose_substitutes(part, name, experts, targets, kept)

    assert [choices[0] for choices in substitutes] == [2, 0, 3, 1]
    assert [len(set(choices)) for choices in substitutes] == [3] * 4
    expected = targets.activations.run(0, targets.entering.dense[0])
    plan = plan_shrinking(outline, {"experts": 4})
    all_kept = {other.name: kept for other in plan.parts.values()}
    shrink_model(model, plan, all_kept | {part.name: KeptExperts(kept, substitutes)})
    output = targets.activations.run(0, targets.entering.dense[0])
    assert torch.allclose(output, expected, atol=1e-5 * float(expected.abs().max()))


def test_substitutes_have_the_least_error_of_the_layer_by_a_plain_loop():
    """Each kept expert is tried in the table itself, on the tokens of a removed one whose rows do not name it."""
    model = tiny_deepseek_v4()
    _, part, name, experts, targets = layer_targets(model, family_tokens())
    gate = model.model.layers[0].mlp.gate
    mlp = model.model.layers[0].mlp
    kept = (1, 3, 4, 6)
    ids = torch.cat(family_tokens())
    states = []
    handle = mlp.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    for batch, hidden in enumerate(targets.entering.dense):
        targets.activations.run(batch, hidden)
    handle.remove()

    substitutes = choose_substitutes(part, name, experts, targets, kept)

    table = gate.tid2eid.clone()
    dense = mlp(torch.cat(states), ids)
    for removed, choices in zip((0, 2, 5, 7), substitutes, strict=True):
        errors = {}
        for candidate in kept:
            gate.tid2eid.copy_(torch.where(table == removed, candidate, table))
            changed = mlp(torch.cat(states), ids)
            rows = table[ids]
            counts = (rows == removed).any(-1) & ~(rows == candidate).any(-1)
            errors[candidate] = float((changed - dense)[counts].square().sum(-1).mean())
        assert list(choices) == sorted(kept, key=errors.get)[:3]


def test_other_whole_numbers_in_a_layer_with_a_mixture_are_refused_by_name():
    model = tiny_deepseek_v4(vocab_size=VOCAB_SIZE)
    router = type(model.model.layers[0].mlp.gate)
    own_init = router.__init__

    def with_other_numbers(self, config):
        own_init(self, config)
        self.register_buffer("order", torch.zeros(4, dtype=torch.long))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(router, "__init__", with_other_numbers)
        outline = ModelOutline(find_decoder_layers(tiny_deepseek_v4()))
        with pytest.raises(
            UnsupportedArchitectureError,
            match=r"can't lose experts: .*gate.order has whole numbers, which may be numbers of experts",
        ):
            outline.parts("experts")


def test_a_router_that_uses_its_table_in_another_way_is_refused(monkeypatch):
    model = tiny_deepseek_v4()
    router = type(model.model.layers[0].mlp.gate)
    own_forward = router.forward

    def next_experts(self, hidden_states, input_ids):
        logits, weights, chosen = own_forward(self, hidden_states, input_ids)
        return logits, weights, (chosen + 1) % NUM_EXPERTS

    monkeypatch.setattr(router, "forward", next_experts)

    with pytest.raises(UnsupportedArchitectureError, match=r"tid2eid .* is not read as a table"):
        prune(model)


def test_a_table_with_experts_that_do_not_exist_is_refused():
    model = tiny_deepseek_v4()
    table = model.model.layers[1].mlp.gate.tid2eid
    unused_token = 1
    table[unused_token, 0] = NUM_EXPERTS

    with pytest.raises(ValueError, match=r"1\.mlp\.gate\.tid2eid names experts from 0 to 8, and"):
        prune(model)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda table: table + 1, {}, "names experts from 1 to 4, and the mixture has 4"),
        (lambda table: 3 - table, {"dense": True}, "tid2eid differs from"),
    ],
)
def test_verify_finds_a_table_that_was_changed(change, options, message, folders, tmp_path):
    dense, smaller, _ = folders
    shutil.copytree(smaller, tmp_path / "changed")
    _change_table(tmp_path / "changed", change)

    with pytest.raises(VerificationError, match=message):
        verify_checkpoint(tmp_path / "changed", dense=dense if options else None)


def test_verify_finds_substitutes_that_do_not_stay(folders, tmp_path):
    _, smaller, report = folders
    shutil.copytree(smaller, tmp_path / "changed")
    file = tmp_path / "changed" / "fista" / "report.json"
    values = json.loads(file.read_text())
    removed = set(range(NUM_EXPERTS)).difference(report.mixtures[0].groups_kept)
    values["layers"][0]["mixture"]["substitutes"][0] = [min(removed)]
    file.write_text(json.dumps(values))

    with pytest.raises(VerificationError, match="do not name experts that stay for each of the 4"):
        verify_checkpoint(tmp_path / "changed")
