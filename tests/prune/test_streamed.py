"""From files to files: the same model as in memory, and no finished layer lost, whatever happens."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from folder_files import files_of
from killed import Killed, interrupted_after, killed_at_write
from media_models import save_llava_folder
from quantized_models import fp8_deepseek
from tiny_llama import save_tiny_folder, tiny_llama, tiny_tokens
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, atomic
from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.output import unfinished_folder
from optimum_fista.prune import journal, named
from optimum_fista.prune.files import FileSink

LAYERS = 4
# What a run that was cut off after the second layer reads when it is started again.
_READ_AGAIN = [
    f"model/model-00002-of-0000{LAYERS + 1}.safetensors",
    "journal/layer-00001.safetensors",
    "journal/states-00002.safetensors",
    "journal/budgets.safetensors",
    "journal/budgets.json",
    "journal/layer-00001.json",
]


# With these options every decoder layer needs the ones before it, so a run keeps hidden states between the layers.
EARLIER_LAYERS = {"error_correction": 0.5, "residual_correction": 1.0}


@pytest.fixture(scope="module")
def source(request, tmp_path_factory) -> Path:
    """A model of four decoder layers in bfloat16, in two shards, with a tokenizer; or the kind that a test asks for."""
    folder = tmp_path_factory.mktemp("source") / getattr(request, "param", "plain")
    if folder.name != "plain":
        return save_llava_folder(folder) if folder.name == "multimodal" else fp8_deepseek(folder)
    save_tiny_folder(folder)
    tiny_llama(num_hidden_layers=LAYERS).to(torch.bfloat16).save_pretrained(
        folder, max_shard_size="40KB"
    )
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder


def prune(
    source: Path, output: Path, config: FistaPruningConfig | None = None, held_out=None, **options
):
    batches = [*tiny_tokens().split(4)]
    batches += [] if held_out is None else [{"input_ids": held_out, "held_out": "/texts/sea.txt"}]
    if config is None and source.name == "fp8":
        config = FistaPruningConfig(method="wanda")
    elif config is None:
        config = FistaPruningConfig(**EARLIER_LAYERS)
    return FistaPruner(config, progress=False).prune(
        str(source), batches, output_dir=output, **options
    )


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    """What an uninterrupted run writes."""
    output = tmp_path_factory.mktemp("whole") / "pruned"
    prune(source, output)
    return output


@pytest.mark.parametrize(
    "config",
    [
        FistaPruningConfig(0.5),
        FistaPruningConfig(0.5, **EARLIER_LAYERS),
        FistaPruningConfig(pattern="2:4", method="sparsegpt", error_correction="none"),
        FistaPruningConfig(
            0.5, method="wanda", error_correction="intra", exclude=("*.layers.3.*", "*.layers.1.*")
        ),
    ],
    ids=["default", "errors of earlier layers", "2:4", "layers left dense"],
)
def test_files_become_what_the_model_becomes_in_memory(source, tmp_path, config):
    model = AutoModelForCausalLM.from_pretrained(source)
    in_memory = FistaPruner(config, progress=False).prune(model, tiny_tokens().split(4))

    report = prune(source, tmp_path / "out", config)

    assert report.totals["num_zeros"] == in_memory.totals["num_zeros"]
    assert [o.fit_error for o in report.operators] == [o.fit_error for o in in_memory.operators]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.dtype == torch.bfloat16
    for (name, expected), found in zip(
        model.named_parameters(), reloaded.parameters(), strict=True
    ):
        assert torch.equal(expected, found), name
    assert verify_checkpoint(tmp_path / "out").num_operators == len(report.operators)
    files = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    assert sorted({*files.values()}) == [
        f"model-{n:05}-of-{LAYERS + 1:05}.safetensors" for n in range(1, LAYERS + 2)
    ]
    assert {files[name] for name in files if ".layers.1." in name} == {
        f"model-00002-of-{LAYERS + 1:05}.safetensors"
    }
    assert not unfinished_folder(tmp_path / "out").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


class Stop(BaseException):
    """An end that nothing catches."""


def stop(*arguments):
    raise Stop


def cut_off(
    monkeypatch, target, name, replacement, *arguments, error=Stop, **options
) -> BaseException:
    """Prune until a replaced function raises."""
    with monkeypatch.context() as patched:
        patched.setattr(target, name, replacement)
        with pytest.raises(error) as raised:
            prune(*arguments, **options)
    return raised.value


# The writes that a run is killed at, by the kind of its model: many of a plain one, and a few of others.
_WRITES = {
    "plain": [*range(1, 22, 3), *range(22, 27)],
    "multimodal": [9, 24, 26],
    "fp8": [2, 18, 21],
}


@pytest.mark.parametrize("third", range(3))
@pytest.mark.parametrize("source", _WRITES, indirect=True)
def test_a_run_cut_off_at_any_write_and_started_again_ends_with_the_same_bytes(
    source, whole, tmp_path, third
):
    for writes in _WRITES[source.name][third::3]:
        output = tmp_path / str(writes)

        with killed_at_write(writes), pytest.raises(Killed):
            prune(source, output)

        assert not output.exists()
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(unfinished_folder(output))

        prune(source, output)

        assert files_of(output) == files_of(whole)


@pytest.fixture(scope="module")
def cut_off_half_way(source, tmp_path_factory) -> Path:
    """What a run leaves that was cut off after the second of four decoder layers; do not write to it."""
    output = tmp_path_factory.mktemp("half") / "pruned"
    with interrupted_after(1), pytest.raises(KeyboardInterrupt):
        prune(source, output)
    return unfinished_folder(output)


def test_half_written_files_of_a_killed_run_are_not_left_in_the_result(
    source, whole, tmp_path, monkeypatch
):
    cut_off(monkeypatch, FileSink, "complete", stop, source, tmp_path / "pruned")
    for name in (".tmpq7NgZZ", ".model-00009-of-00009.safetensors.partial"):
        (unfinished_folder(tmp_path / "pruned") / "model" / name).write_bytes(b"half a shard")

    prune(source, tmp_path / "pruned")

    assert files_of(tmp_path / "pruned") == files_of(whole)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, "flipped") for name in [*_READ_AGAIN, "journal/weights.json"]),
        *((name, "gone") for name in _READ_AGAIN),
        ("journal/states-00002.safetensors", "truncated"),
        ("journal/layer-00001.json", "truncated"),
    ],
)
def test_a_run_that_resumes_on_a_damaged_file_ends_with_the_same_bytes(
    source, whole, cut_off_half_way, tmp_path, name, damage
):
    shutil.copytree(cut_off_half_way, unfinished_folder(tmp_path / "pruned"))
    file = unfinished_folder(tmp_path / "pruned") / name
    data = bytearray(file.read_bytes())
    data[-len(data) // 3] ^= 1
    file.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    if damage == "gone":
        file.unlink()

    prune(source, tmp_path / "pruned")

    assert files_of(tmp_path / "pruned") == files_of(whole)


def test_a_damaged_fingerprint_is_refused_unless_the_run_overwrites(
    source, cut_off_half_way, tmp_path
):
    shutil.copytree(cut_off_half_way, unfinished_folder(tmp_path / "pruned"))
    file = unfinished_folder(tmp_path / "pruned") / "journal" / "fingerprint.json"

    file.write_text(file.read_text().replace("0.5", "0.6"))

    with pytest.raises(
        ValueError,
        match=r"fingerprint\.json' is damaged.*pass another folder, or pass overwrite=True",
    ):
        prune(source, tmp_path / "pruned")
    prune(source, tmp_path / "pruned", overwrite=True)


def test_a_resumed_run_prunes_again_what_follows_a_layer_that_was_made_otherwise(
    source, whole, cut_off_half_way, tmp_path, monkeypatch
):
    """Layer 0 is made again and comes out otherwise; the layers after it, which are whole, do not fit it."""
    output = unfinished_folder(tmp_path / "pruned")
    shutil.copytree(cut_off_half_way, output)
    (output / f"model/model-00001-of-0000{LAYERS + 1}.safetensors").unlink()
    write = FileSink.write

    def otherwise(self, operator, weight, mask):
        write(self, operator, weight * 0.5, mask)

    with interrupted_after(0), monkeypatch.context() as patched:
        patched.setattr(FileSink, "write", otherwise)
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "pruned")
    kept = []
    keep = journal.Journal.keep_layer
    monkeypatch.setattr(
        journal.Journal,
        "keep_layer",
        lambda self, index, *others: [kept.append(index), keep(self, index, *others)],
    )

    prune(source, tmp_path / "pruned")

    assert kept == [1, 2, 3]


def test_a_resumed_run_takes_no_layers_or_budgets_of_another_run(source, tmp_path, monkeypatch):
    """Files of two runs with other methods, copied from one unfinished folder into the other."""
    configs = {
        name: FistaPruningConfig(method=name, error_correction="none")
        for name in ("magnitude", "wanda")
    }
    for name, config in configs.items():
        cut_off(monkeypatch, FileSink, "complete", stop, source, tmp_path / name, config)
    prune(source, tmp_path / "whole", configs["wanda"])
    other, mine = (unfinished_folder(tmp_path / name) for name in configs)
    for file in [
        *other.glob("model/model-*"),
        *other.glob("journal/*.json"),
        *other.glob("journal/[lb]*.safetensors"),
    ]:
        if file.name not in ("fingerprint.json", "weights.json"):
            shutil.copy2(file, mine / file.relative_to(other))

    prune(source, tmp_path / "wanda", configs["wanda"])

    assert files_of(tmp_path / "wanda") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("source", _WRITES, indirect=True)
def test_a_run_that_a_full_disk_stopped_keeps_its_finished_layers_and_resumes(
    source, whole, tmp_path, monkeypatch
):
    output = tmp_path / "pruned"
    flush = atomic.flush
    flushed = []

    def flush_until_full(path):
        """Fail as a full disk does, from the file of the third decoder layer on."""
        flushed.append(path.name)
        if any("model-00003-of" in name for name in flushed):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        flush(path)

    error = cut_off(monkeypatch, atomic, "flush", flush_until_full, source, output, error=OSError)

    assert error.errno == errno.ENOSPC
    # one of the models has 3 decoder layers
    assert re.search(
        r"No space left on device.*: 2 of [34] decoder layers are finished and kept in .*pruned",
        str(error),
    )
    assert not [*unfinished_folder(output).rglob("*.partial")]

    prune(source, output)  # the disk has space again

    assert files_of(output) == files_of(whole)


@pytest.mark.parametrize(
    ("option", "pruner"), [({"device": "moon"}, {}), ({}, {"storage_device": "moon"})]
)
def test_an_unknown_device_is_refused_before_any_work(
    source, tmp_path, monkeypatch, option, pruner
):
    monkeypatch.setattr(named, "load_lazily", None)

    with pytest.raises(ValueError, match=r"device='moon'"):
        FistaPruner(progress=False, **pruner).prune(
            source, [], output_dir=tmp_path / "out", **option
        )
    assert not [*tmp_path.iterdir()]


def test_an_output_that_cannot_be_written_to_is_refused_before_any_work(
    source, tmp_path, monkeypatch
):
    monkeypatch.setattr(named, "load_lazily", None)

    (tmp_path / "file").write_text("kept")

    with pytest.raises(
        OSError, match=r"output_dir='.*' can't be written to \(.*\), nothing was done: pass another"
    ):
        prune(source, tmp_path / "file" / "pruned")
    assert (tmp_path / "file").read_text() == "kept"


def test_another_run_in_the_same_folder_is_refused_by_its_differences(
    source, whole, tmp_path, monkeypatch
):
    cut_off(monkeypatch, journal.Journal, "keep_layer", stop, source, tmp_path / "pruned")

    with pytest.raises(
        ValueError,
        match=r"unfinished run in .* was another one \(config\.sparsity was 0\.5, is 0\.25\)\. Start it",
    ):
        prune(source, tmp_path / "pruned", FistaPruningConfig(0.25, **EARLIER_LAYERS))
    long = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    differs = r'config\.exclude was \[\], is \["model\.layers\.0\.mlp\.gate_proj", .*\.\.\.'
    with pytest.raises(ValueError, match=differs):
        prune(source, tmp_path / "pruned", FistaPruningConfig(exclude=long, **EARLIER_LAYERS))
    with pytest.raises(ValueError, match=r"another one \(batches was"):
        FistaPruner(FistaPruningConfig(**EARLIER_LAYERS), progress=False).prune(
            source, tiny_tokens().split(2), output_dir=tmp_path / "pruned"
        )
    prune(source, tmp_path / "pruned", FistaPruningConfig(0.25), overwrite=True)
    assert verify_checkpoint(tmp_path / "pruned").num_operators == 7 * LAYERS


def test_a_name_needs_an_output_folder_and_a_loaded_model_takes_none(
    source, llama, tokens, tmp_path
):
    with pytest.raises(ValueError, match=r"model='.*' is a name: pass output_dir as well"):
        FistaPruner(progress=False).prune(str(source), tokens.split(4))
    with pytest.raises(ValueError, match="output_dir is for a model given by name"):
        FistaPruner(progress=False).prune(llama, tokens.split(4), output_dir=tmp_path / "out")


def perplexity_of(folder: Path, tokens: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(t[None]).logits[0, :-1].float(), t[1:])
            for t in tokens
        ]
    return float(torch.stack(losses).mean().exp())


@pytest.mark.parametrize(
    "config",
    [FistaPruningConfig(0.5), FistaPruningConfig(pattern="channels:0.25+layers:0.25")],
    ids=["default", "smaller"],
)
def test_a_run_reports_the_perplexity_of_the_dense_and_the_pruned_network(source, tmp_path, config):
    tokens = tiny_tokens(11)[8:]

    report = prune(source, tmp_path / "out", config, held_out=tokens)

    assert report.perplexity["num_tokens"] == tokens.numel()
    plain = prune(source, tmp_path / "plain", config)
    assert [o.fit_error for o in plain.operators] == [o.fit_error for o in report.operators]
    for network, folder in {"dense": source, "pruned": tmp_path / "out"}.items():
        assert report.perplexity[network] == pytest.approx(
            perplexity_of(folder, tokens), rel=2e-2
        ), network
    assert report.perplexity["dense"] != report.perplexity["pruned"]
    saved = json.loads((tmp_path / "out" / "fista" / "report.json").read_text())
    assert saved["perplexity"] == report.perplexity
    assert (
        "tokens of sea.txt that no weight was fitted to |"
        in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.parametrize(
    ("correction", "layer", "lost"),
    [
        (0.5, 1, ""),
        ("intra", LAYERS - 1, ""),
        ("intra", 1, "states-00002.safetensors"),
        ("intra", LAYERS - 1, "layer-00000.json"),
    ],
)
def test_a_resumed_run_reports_the_same_perplexity_or_none_if_states_were_lost(
    source, tmp_path, layer, correction, lost
):
    config = FistaPruningConfig(0.5, method="wanda", error_correction=correction)
    tokens = tiny_tokens(10)[8:]
    expected = prune(source, tmp_path / "whole", config, held_out=tokens).perplexity

    with interrupted_after(layer), pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", config, held_out=tokens)
    if lost:
        unfinished_folder(tmp_path / "out").joinpath("journal", lost).unlink()
    found = prune(source, tmp_path / "out", config, held_out=tokens).perplexity

    assert found == (None if lost else expected)
