"""`--target-size`: what goes is chosen, said before, and leaves at most the size that was asked for."""

import json
import shutil

import pytest
import torch
from folder_files import tensors_of
from killed import interrupted_after
from rare_tokens import COMMON, RARE, TEXT, save, text_of
from safetensors.torch import save_file
from tiny_llama import QUICK

from optimum_fista.cli import target_size
from optimum_fista.cli.main import main
from optimum_fista.folder.checkpoint import kept_tokens, read_report
from optimum_fista.prune import measuring
from optimum_fista.source.loading import load_model
from optimum_fista.text import token_counts

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(tokens that stay|belong to no token|bits per byte)"
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model, of whose tokens the text uses some; do not write to it."""
    return save(tmp_path_factory.mktemp("dense"), spare=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def parameters_of(folder) -> int:
    return load_model(str(folder))[0].num_parameters()


def test_a_size_is_reached_by_tokens_that_the_text_lacks_and_then_by_channels(
    dense, text, tmp_path, capsys
):
    folder = tmp_path / "sized"
    flags = ["--method", "wanda", *QUICK, "--calibration", str(text)]
    command = ["prune", str(dense), "-o", str(folder), "--target-size", "0.8", *flags]

    with interrupted_after(0):
        assert main(command) == 130
    at_first = capsys.readouterr().err

    assert main(command) == 0

    # The first run removed tokens, and the second one channels.
    printed = capsys.readouterr()
    tokens = tmp_path / "sized-tokens"
    first = read_report(tokens)
    second = read_report(folder)
    share = second.config["pattern"]
    of_tokens = first.config["pattern"]
    assert of_tokens.startswith("vocab:0.")
    assert [step.pattern for step in second.steps] == [of_tokens, share]
    assert share.startswith("channels:0.")
    assert kept_tokens(folder).tolist() == kept_tokens(tokens).tolist()

    before = first.model["dense_num_parameters"]
    after_first = first.model["num_parameters"]
    after_second = second.model["num_parameters"]
    one_channel_more = 2 * 3 * 32
    assert 0.8 * before - one_channel_more < after_second <= 0.8 * before < after_first

    num_kept = first.model["vocabulary"]["kept"]
    total = first.model["vocabulary"]["before"]
    gone = f"{total - num_kept:,} of {total:,} tokens"
    left = f"{after_second:,} parameters are left ({after_second / before:.2%})"
    chosen = f"{of_tokens} ({gone}), then {share}: {left}"
    assert f"-> {chosen}" in at_first
    assert "as many tokens go as may go" in at_first  # the text is too short to measure on
    assert f"the run that was begun goes on: {chosen}" in printed.err
    assert "not measured" in printed.err  # the text is too short
    assert "nothing" not in printed.err
    # The teacher is the dense model, not that with fewer tokens.
    assert f"recover {folder} --teacher {dense} " in printed.out

    num_removed = before - after_second
    in_all = f"{num_removed:,} of {before:,} parameters removed ({num_removed / before:.2%}, "
    card = (folder / "README.md").read_text()
    assert in_all in printed.out
    assert in_all in card
    assert f"# {dense.name}, {of_tokens}, then {share}\n" in card

    # The result can be pruned again.
    flags = ["--method", "wanda", "--pattern", "2:4", *QUICK, "--calibration", str(text)]

    assert main(["prune", str(folder), "-o", str(tmp_path / "zeros"), *flags]) == 0

    patterns = [step.pattern for step in read_report(tmp_path / "zeros").steps]
    assert patterns == [of_tokens, share, "2:4"]

    assert main(["verify", str(tmp_path / "zeros")]) == 0


def test_tokens_that_an_earlier_start_removed_are_those_of_the_model_as_it_is_now(
    dense, text, tmp_path, capsys
):
    model = shutil.copytree(dense, tmp_path / "model")
    folder = tmp_path / "sized"
    flags = ["-o", str(folder), "--target-size", "0.8"]
    flags += ["--method", "wanda", *QUICK, "--calibration", str(text)]

    with interrupted_after(0):
        assert main(["prune", str(model), *flags]) == 130

    first = tensors_of(tmp_path / "sized-tokens")
    doubled = {name: 2 * tensor for name, tensor in tensors_of(model).items()}
    save_file(doubled, model / "model.safetensors", {"format": "pt"})
    other = shutil.copytree(model, tmp_path / "other")

    # What the folder holds may be a model of its own.
    assert main(["prune", str(other), *flags]) == 1

    assert "sized-tokens' already holds a model" in capsys.readouterr().err

    assert main(["prune", str(model), *flags, "--overwrite"]) == 0

    for name in ("sized", "sized-tokens"):
        assert torch.equal(
            tensors_of(tmp_path / name)["lm_head.weight"], 2 * first["lm_head.weight"]
        )

    report = tmp_path / "sized-tokens" / "fista" / "report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"retrained": True}))
    shutil.rmtree(folder)

    # Weights that were trained are not replaced.
    assert main(["prune", str(model), *flags]) == 1

    assert "sized-tokens' already holds a model" in capsys.readouterr().err

    shutil.rmtree(tmp_path / "sized-tokens")
    again = [*QUICK, "--calibration", str(text), "-o", str(tmp_path / "sized-tokens")]
    again += ["--pattern", "channels:0.25", "--method", "wanda"]
    assert main(["prune", str(dense), *again]) == 0

    # --overwrite is for `sized`, and the other folder holds the result of another run now.
    assert main(["prune", str(model), *flags, "--overwrite"]) == 1

    assert "sized-tokens' already holds a model" in capsys.readouterr().err
    assert read_report(tmp_path / "sized-tokens").config["pattern"] == "channels:0.25"


def test_a_size_that_tokens_reach_needs_one_run(dense, text, tmp_path, capsys):
    folder = tmp_path / "sized"
    command = ["prune", str(dense), "-o", str(folder), "--target-size", "0.97", *QUICK]

    assert main([*command, "--calibration", str(text), "--keep-tokens", "zebra"]) == 0

    report = read_report(folder)
    before = report.model["dense_num_parameters"]
    said = capsys.readouterr()
    after = report.model["num_parameters"]
    assert f"{after:,} parameters are left ({after / before:.2%})" in said.err
    assert "as many tokens go as may go" in said.err  # the text is too short to measure on
    assert "not measured" in said.out
    assert f"recover {folder} --teacher" in said.out
    assert report.config["keep_tokens"] == ["zebra"]
    assert report.config["pattern"].startswith("vocab:0.")
    assert 0.97 * before - 64 * 64 < report.model["num_parameters"] <= 0.97 * before
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == ["sized"]


def test_a_size_that_tokens_reach_does_not_use_another_dtype_and_says_so(dense, text, tmp_path):
    folder = tmp_path / "sized"
    flags = ["--calibration", str(text), "--dtype", "bfloat16"]
    command = ["prune", str(dense), "-o", str(folder), "--target-size", "0.97", *QUICK, *flags]

    with pytest.warns(
        UserWarning,
        match="dtype=bfloat16 is not used: tensors are copied as they are stored .float32",
    ):
        assert main(command) == 0

    assert tensors_of(folder)["model.embed_tokens.weight"].dtype == torch.float32


def test_a_size_is_reached_by_channels_alone_if_no_text_says_which_tokens_are_rare(
    dense, tmp_path, capsys
):
    folder = tmp_path / "sized"
    flags = ["--method", "wanda", *QUICK, "--calibration", "self"]

    assert main(["prune", str(dense), "-o", str(folder), "--target-size", "0.9", *flags]) == 0

    assert "no token is removed: a model's own text is too short to tell" in capsys.readouterr().err
    assert read_report(folder).model["num_parameters"] <= 0.9 * parameters_of(dense)


def test_all_texts_are_read_and_no_token_is_removed_if_they_have_all(dense, text, tmp_path, capsys):
    (tmp_path / "all.txt").write_text(f"{TEXT} {text_of(RARE)} {''.join(map(chr, range(256)))}")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    command = [
        "prune",
        str(dense),
        "-o",
        str(tmp_path / "sized"),
        "--target-size",
        "0.9",
        "--method",
        "wanda",
        *QUICK,
    ]
    command += ["--calibration", str(text), "--calibration"]

    assert main([*command, str(tmp_path / "latin.txt")]) == 1

    said = capsys.readouterr().err
    assert "error: source" in said
    assert "no token is removed" not in said

    assert main([*command, str(tmp_path / "all.txt")]) == 0

    assert "all 356 tokens would stay" in capsys.readouterr().err


def test_tokens_stay_if_too_few_may_go_for_a_share_of_them(tmp_path, capsys):
    dense = save(
        tmp_path / "dense", spare=8
    )  # the embedding has 8 rows without a token, which may go
    text = tmp_path / "all.txt"
    text.write_text(f"{TEXT} {text_of(RARE)} {''.join(map(chr, range(256)))}")
    command = ["prune", str(dense), "-o", str(tmp_path / "sized"), "--target-size", "0.9"]
    command += ["--method", "wanda", *QUICK, "--calibration", str(text), "--dry-run"]

    assert main(command) == 0

    said = capsys.readouterr()
    assert "vocab:" not in said.out
    assert "no token is removed: pattern='vocab:unused': all 364 tokens would stay" in said.err
    assert "channels:" in said.out + said.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-size", "0.8", "--pattern", "2:4"], "pass it without --pattern"),
        (
            ["--target-size", "1.5"],
            "--target-size 1.5: pass the share of the parameters that is to be left, in (0, 1)",
        ),
        (["--target-size", "0.8", "--packed"], "leaves a dense model: there are no zeros to pack"),
        (
            ["--target-size", "0.01", "--dry-run"],
            "of the parameters are left if 1 of 48 channels stay in every decoder layer: pass at least that",
        ),
    ],
)
def test_sizes_that_make_no_sense_are_refused(dense, text, tmp_path, capsys, flags, message):
    text = ["--calibration", str(text)]

    assert main(["prune", str(dense), "-o", str(tmp_path / "out"), *text, *QUICK, *flags]) == 1

    assert message in capsys.readouterr().err
    assert not any(file.is_dir() for file in tmp_path.iterdir())


def test_a_dry_run_counts_once_and_says_what_every_candidate_leaves(
    dense, text, tmp_path, capsys, monkeypatch
):
    counted = []
    count = token_counts.count_tokens

    def counting(tokenizer, documents, size):
        counted.append(size)
        return count(tokenizer, documents, size)

    monkeypatch.setattr("optimum_fista.removal.counted_model.count_tokens", counting)
    # no layer is tried
    monkeypatch.setattr("optimum_fista.estimate.estimate.Estimate.seconds", None)
    flags = ["--method", "wanda", *QUICK, "--calibration", str(text), "--dry-run"]
    command = ["prune", str(dense), "-o", str(tmp_path / "sized"), *flags]

    for size in (0.97, 0.8):
        counted.clear()

        assert main([*command, "--target-size", str(size)]) == 0

        said = capsys.readouterr().out
        lines = [line for line in said.splitlines() if "parameters are left" in line]
        assert lines[0].startswith("vocab:0.")
        assert ("then channels:0." in lines[0]) == (size == 0.8)
        assert lines[1].startswith("channels:0.")
        assert len(lines) == 2
        assert "which of these is chosen is found by trials" in said
        assert len(counted) == 1

    assert not any(file.is_dir() for file in tmp_path.iterdir())


def test_the_result_of_two_runs_is_named_and_measured_by_the_model_of_the_user(
    dense, text, tmp_path
):
    folder = tmp_path / "sized"
    flags = ["--method", "wanda", *QUICK, "--calibration", str(text)]

    assert main(["prune", str(dense), "-o", str(folder), "--target-size", "0.8", *flags]) == 0

    report = read_report(folder)
    card = (folder / "README.md").read_text()
    share = 1 - report.model["num_parameters"] / parameters_of(dense)
    assert report.first_model.name == dense.name
    assert f"# {dense.name}, {report.steps[0].pattern}, then channels:" in card
    assert f"({share:.2%}, " in card
    assert "sized-tokens" not in card.partition("```python")[0].partition("---\n\n")[2]


def test_the_folder_of_another_model_of_the_same_name_and_size_is_not_replaced(
    dense, text, tmp_path, capsys
):
    flags = f"--target-size 0.8 --calibration {text} --num-samples 4 --sequence-length 16"
    command = [*flags.split(), "--device", "cpu", "--output", str(tmp_path / "sized")]
    first = shutil.copytree(dense, tmp_path / "a" / "net")
    second = shutil.copytree(dense, tmp_path / "b" / "net")
    model = load_model(str(second))[0]
    model.model.norm.weight.data.mul_(2)
    model.save_pretrained(second)
    assert main(["prune", str(first), *command]) == 0
    (tmp_path / "sized").rename(tmp_path / "moved")
    kept = (tmp_path / "sized-tokens" / "fista" / "files.json").read_bytes()

    assert main(["prune", str(second), *command]) == 1

    assert "already holds a model" in capsys.readouterr().err
    assert (tmp_path / "sized-tokens" / "fista" / "files.json").read_bytes() == kept


@pytest.mark.parametrize(("size", "finished"), [("0.97", "sized"), ("0.8", "sized-tokens")])
def test_ctrl_c_while_texts_are_measured_after_tokens_are_removed_names_the_finished_model(
    dense, text, tmp_path, capsys, monkeypatch, size, finished
):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(text_of(COMMON, 5000))  # 4,096 tokens and more
    flags = ["--target-size", size, *QUICK, "--calibration", str(text), "--measure", str(held_out)]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(target_size, "_chosen", lambda candidates, texts: candidates[0])
    monkeypatch.setattr(measuring, "losses_of_folder", interrupt)
    with pytest.warns(match=r"held-out\.txt is not known \(stopped by Ctrl-C\)"):
        status = main(["prune", str(dense), "-o", str(tmp_path / "sized"), *flags])

    assert status == 130
    folder = tmp_path / finished
    words = f"the model in {folder} is finished, and its texts were not measured to the end"
    assert f"interrupted: {words}\n" in capsys.readouterr().err
    assert read_report(folder).texts_not_measured == ["held-out.txt"]
