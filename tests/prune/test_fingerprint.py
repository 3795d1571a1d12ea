"""A run that was cut off resumes on the same weights, the same configuration and the same arithmetic only."""

import json
import os
import shutil
from pathlib import Path

import pytest
from killed import interrupted_after
from quantized_models import fp8_deepseek
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_llama import tiny_llama, tiny_tokens
from tiny_models import tiny_model

from optimum_fista import FistaPruner, FistaPruningConfig, PruningCallback
from optimum_fista.atomic import read_record, write_record
from optimum_fista.prune import source_files
from optimum_fista.prune.journal import Journal

WANDA = FistaPruningConfig(method="wanda", error_correction="full")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """Two decoder layers."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def source(dense, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(dense, tmp_path / "source"))


def prune(source: Path, config: FistaPruningConfig = WANDA, **options):
    batches = tiny_tokens().split(4)
    return FistaPruner(config, progress=False).prune(
        source, batches, output_dir=source.parent / "pruned", device="cpu", **options
    )


@pytest.fixture
def journal_of_cut_off_run(source) -> Path:
    """The journal of a run that was cut off after the first of two decoder layers."""
    with interrupted_after(0), pytest.raises(KeyboardInterrupt):
        prune(source)
    return source.parent / "pruned.unfinished" / "journal"


def zero_unnoticed(file: Path, name: str) -> None:
    """Zero a tensor in its file, whose size and time of change stay what they were."""
    before = file.stat()
    with safe_open(file, "pt") as tensors:
        expected = tensors.get_tensor(name).clone()
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    # a safetensors file begins with the length of its header in 8 bytes
    data[8 + length + begin : 8 + length + end] = bytes(end - begin)
    with file.open("r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert bool(expected.any())
    assert not bool(load_file(file)[name].any())


def test_a_cut_off_run_is_not_resumed_on_other_weights_or_in_another_dtype(
    source, journal_of_cut_off_run
):
    with pytest.raises(
        ValueError,
        match=r"was another one \(.*arithmetic.dtype was \"torch.float32\", is \"torch.bf",
    ):
        prune(source, dtype="bfloat16")

    zero_unnoticed(source / "model.safetensors", "model.norm.weight")
    with pytest.raises(
        ValueError, match=r"was another one \(weights.model.safetensors was .*, is .*\)\. Start it"
    ):
        prune(source)


def test_a_run_resumes_on_weights_that_were_touched_or_copied(
    source, journal_of_cut_off_run, tmp_path
):
    (source / "model.safetensors").touch()
    moved = source.rename(tmp_path / "moved")
    shutil.copytree(moved, source)

    prune(source)  # on other weights, this would be an error

    # the journal goes when a run is finished
    assert not journal_of_cut_off_run.exists()


def test_a_run_that_resumes_does_not_hash_unchanged_files_again(
    source, journal_of_cut_off_run, monkeypatch
):
    digest = source_files.digest_of
    monkeypatch.setattr(
        source_files,
        "digest_of",
        lambda path: "read again" if path.parent == source else digest(path),
    )

    prune(source)  # with the digest "read again", this would be an error


@pytest.mark.parametrize("write", [None, fp8_deepseek])
@pytest.mark.parametrize(
    ("after", "kept"), [("keep_budgets", {"budgets"}), ("keep_layer", {"budgets", "layer-00000"})]
)
def test_weights_that_change_while_they_are_pruned_end_the_run(
    source, monkeypatch, tmp_path, after, kept, write
):
    keep = getattr(Journal, after)
    source = source if write is None else write(tmp_path / "quantized")

    def change(*arguments):
        keep(*arguments)
        zero_unnoticed(source / "model.safetensors", "model.layers.1.self_attn.o_proj.weight")

    with monkeypatch.context() as patched:
        patched.setattr(Journal, after, change)
        with pytest.raises(
            ValueError, match=r"^model.safetensors in .* changed during the run: restore"
        ):
            prune(source)

    names = {path.stem for path in (source.parent / "pruned.unfinished" / "journal").glob("*.json")}
    assert names - {"fingerprint", "weights"} == kept

    with pytest.raises(ValueError, match="was another one"):
        prune(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act was "silu", is "gelu"'),
        (
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
            "rope_parameters.rope_theta was 10000.0",
        ),
    ],
)
def test_a_cut_off_run_is_not_resumed_on_another_configuration_of_the_model(
    source, journal_of_cut_off_run, change, message
):
    file = source / "config.json"

    file.write_text(json.dumps(json.loads(file.read_text()) | change))

    with pytest.raises(ValueError, match=rf"was another one \(model_config\.{message}"):
        prune(source)


def test_a_cut_off_run_is_not_resumed_with_its_overrides_in_another_order(source):
    overrides = {"*q_proj": 0.25, "*_proj": 0.75}

    for names, end in (
        ([*overrides], pytest.raises(KeyboardInterrupt)),
        ([*overrides][::-1], pytest.raises(ValueError)),
    ):
        config = FistaPruningConfig(
            method="wanda", overrides={name: overrides[name] for name in names}
        )
        with interrupted_after(0), end as caught:
            prune(source, config)

    assert r'config.overrides was {"*q_proj": 0.25, "*_proj": 0.75}, is {"*_proj": 0.75' in str(
        caught.value
    )
    # It takes no decoder layer of the other order.
    report = prune(source, config, overwrite=True)
    assert {operator.target_sparsity for operator in report.operators} == {0.75}


def test_a_run_resumes_if_a_number_is_written_in_another_way(source):
    with interrupted_after(0), pytest.raises(KeyboardInterrupt):
        prune(source, FistaPruningConfig(method="wanda", residual_correction=1))
    pruned_again = []

    class Recorder(PruningCallback):
        def on_layer_end(self, index, *others):
            pruned_again.append(index)

    config = FistaPruningConfig(method="wanda", residual_correction=1.0)
    pruner = FistaPruner(config, progress=False, callbacks=[Recorder()])
    pruner.prune(source, tiny_tokens().split(4), output_dir=source.parent / "pruned", device="cpu")

    assert pruned_again == [1]


def test_a_run_resumes_if_only_names_and_versions_in_the_configuration_changed(
    source, journal_of_cut_off_run
):
    file = source / "config.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text()) | {"transformers_version": "1.0", "_name_or_path": "x"}
        )
    )

    prune(source)  # if the configuration counted as another one, this would be an error


def of_two_texts(*names):
    """Batches of which each is of the text that is named."""
    batches = tiny_tokens().split(2)
    return [{"input_ids": ids, "source": name} for ids, name in zip(batches, names, strict=True)]


def test_a_run_on_several_texts_resumes_only_if_each_batch_is_of_the_same_one(source, tmp_path):
    pruner = FistaPruner(WANDA, progress=False)
    options = {"output_dir": tmp_path / "pruned", "device": "cpu"}
    with interrupted_after(0), pytest.raises(KeyboardInterrupt):
        pruner.prune(source, of_two_texts("a", "b", "a", "b"), **options)

    with pytest.raises(ValueError, match=r"was another one \(sources was \[0, 1, 0, 1\], is null"):
        pruner.prune(source, tiny_tokens().split(2), **options)
    with pytest.raises(ValueError, match=r"another one \(sources was \[0, 1, 0, 1\], is \[0, 0, 1"):
        pruner.prune(source, of_two_texts("a", "a", "b", "b"), **options)
    report = pruner.prune(source, of_two_texts("a", "b", "a", "b"), **options)

    assert report.calibration["source"] == "a, b"
    assert [text["num_tokens"] for text in report.calibration["sources"]] == [64, 64]


def test_a_fingerprint_has_no_entries_that_came_later_and_are_not_used(
    source, journal_of_cut_off_run
):
    """So runs that were begun before there were several texts and `keep_divisible` resume."""
    run = read_record(journal_of_cut_off_run / "fingerprint.json")

    assert "sources" not in run
    assert "keep_divisible" not in run["config"]


def begun_by_an_older_version(source, config, journal=10, **options):
    """Cut a run off after its first layer, and make its journal one of this format, which is older.

    `options` are those that the older version had chosen otherwise.
    """
    with interrupted_after(0), pytest.raises(KeyboardInterrupt):
        prune(source, config)
    run_file = source.parent / "pruned.unfinished" / "journal" / "fingerprint.json"
    run = read_record(run_file)
    assert run is not None
    write_record(run_file, run | {"journal": journal, "config": run["config"] | options})


@pytest.mark.parametrize("journal", [10, 11])
def test_a_run_of_an_older_version_that_removes_experts_is_refused(tmp_path, journal):
    source = tmp_path / "source"
    tiny_model("mixtral").save_pretrained(source)
    config = FistaPruningConfig(pattern="experts:0.5")
    begun_by_an_older_version(source, config, journal)

    with pytest.raises(
        ValueError, match=r"was begun by an older version of optimum-fista, .*: end it with that"
    ):
        prune(source, config)

    report = prune(source, config, overwrite=True)
    assert report.mixtures


@pytest.mark.parametrize(
    "options",
    [{}, {"pattern": "2:4"}, {"pattern": "channels:0.25"}, {"allocation_tokens": 2048}],
)
def test_a_run_of_the_default_method_that_an_older_version_has_begun_is_refused(source, options):
    config = FistaPruningConfig(**options)
    begun_by_an_older_version(source, config, allocation_tokens=2048)

    with pytest.raises(ValueError, match=r"was begun by an older version of optimum-fista"):
        prune(source, config)
    other = FistaPruningConfig(**options, residual_correction=0.5)
    with pytest.raises(ValueError, match=r"was another one \(.*config\.residual_correction was"):
        prune(source, other)


@pytest.mark.parametrize("pattern", ["2:4", "channels:0.25"])
def test_a_run_of_an_older_version_that_removes_no_experts_resumes(source, pattern):
    config = FistaPruningConfig(pattern=pattern, method="wanda")
    begun_by_an_older_version(source, config)
    pruned_again = []

    class Recorder(PruningCallback):
        def on_layer_end(self, index, *others):
            pruned_again.append(index)

    pruner = FistaPruner(config, progress=False, callbacks=[Recorder()])
    pruner.prune(source, tiny_tokens().split(4), output_dir=source.parent / "pruned", device="cpu")

    assert pruned_again == [1]
