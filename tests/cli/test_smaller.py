"""A model that lost whole parts, in every command: what is said of it is true."""

import pytest
from families import family_model
from tiny_llama import QUICK, tiny_llama, tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoConfig

from optimum_fista.cli.main import main
from optimum_fista.folder.checkpoint import read_report

PATTERN = "channels:0.25/4+heads:0.5"
# Of each of two decoder layers: 12 of 48 channels with 3 x 32 weights, 1 of 2 groups with 32 x (16 + 16 + 8 + 8).
GONE, DENSE = 2 * (12 * 3 * 32 + 32 * 48), 19_616
REMOVED = f"{GONE:,} of {DENSE:,} parameters removed ({GONE / DENSE:.2%}), {DENSE - GONE:,} left"


@pytest.fixture(scope="module")
def smaller(tiny_folder, text_file, tmp_path_factory):
    """The folder of a smaller model, and what the command printed; do not write to it."""
    folder = tmp_path_factory.mktemp("smaller") / "model"
    flags = ["--pattern", PATTERN, "--method", "wanda", *QUICK, "--calibration", str(text_file)]
    assert main(["prune", str(tiny_folder), "-o", str(folder), *flags]) == 0
    return folder


def test_every_output_names_the_removed_parts_in_place_of_zeros(smaller, capsys):
    assert str(read_report(smaller)).startswith(
        f"4 operators pruned by wanda, {REMOVED}; fit error"
    )

    assert main(["verify", str(smaller)]) == 0

    assert capsys.readouterr().out == f"{smaller}: 4 operators keep their pattern, {REMOVED}\n"
    card = (smaller / "README.md").read_text()
    assert REMOVED in card
    assert "| mlp.down_proj | 32 x 36 | 25.00% |" in card
    assert "zero (" not in card


@pytest.mark.parametrize("pattern", ["layers:0.5", "channels:0.25/4+layers:0.5"])
def test_removed_decoder_layers_are_named_and_a_page_needs_a_pruned_operator(
    tiny_folder, text_file, tmp_path, capsys, pattern
):
    output = tmp_path / "pruned"
    flags = ["--pattern", pattern, "--method", "wanda", *QUICK, "--calibration", str(text_file)]

    assert main(["prune", str(tiny_folder), "-o", str(output), *flags]) == 0

    ((index, loss),) = read_report(output).model["layers_removed"]
    named = f"{index} (loss {loss:.4f}), in this order"
    assert f"| decoder layers removed | {named} |" in (output / "README.md").read_text()
    assert main(["verify", str(output), "--dense", str(tiny_folder)]) == 0
    capsys.readouterr()
    exit_code = main(["report", str(output)])
    if pattern == "layers:0.5":
        assert exit_code == 1
        message = "names no pruned operator: only decoder layers were removed"
        assert message in capsys.readouterr().err
    else:
        assert exit_code == 0
        assert f"<p>Decoder layers {named}" in (output / "fista" / "report.html").read_text()


def test_removed_experts_are_counted_in_every_command(text_file, tmp_path, capsys):
    dense = tmp_path / "dense"
    folder = tmp_path / "smaller"
    tiny_model("mixtral").save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    flags = ["--pattern", "experts:0.5", *QUICK, "--calibration", str(text_file)]

    assert main(["prune", str(dense), "-o", str(folder), *flags]) == 0

    left = "2 of 4 experts left in each of 2 mixtures (REAP), fit error of their outputs"
    assert left in capsys.readouterr().out
    assert left in (folder / "README.md").read_text()

    assert main(["verify", str(folder), "--dense", str(dense)]) == 0

    assert ": 0 operators and 2 mixtures keep their pattern, " in capsys.readouterr().out

    assert main(["prune", str(dense), "--dry-run", *flags, "--no-expert-refit"]) == 0

    assert (
        "left dense (keeps 2 of 4 experts): model.layers.0.mlp.experts" in capsys.readouterr().out
    )


def test_a_number_of_experts_is_kept_that_the_devices_divide(
    text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    tiny_model("mixtral", num_local_experts=6).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    flags = ["--pattern", "experts:0.25", "--keep-divisible", "2", *QUICK]
    command = ["prune", "model", *flags, "--calibration", str(text_file)]

    assert main([*command, "--dry-run"]) == 0

    removed = (
        "2 of 6 experts of every decoder layer (33.33%; asked for: 25%; 4 stay, a multiple of 2)"
    )
    assert f"removed      {removed}\n" in capsys.readouterr().out

    assert main(command) == 0

    said = capsys.readouterr()
    assert f"removed      {removed}\n" in said.err
    assert "saved to model-experts-0.33\n" in said.out
    card = (tmp_path / "model-experts-0.33" / "README.md").read_text()
    assert f"| removed | {removed} |" in card
    assert main(["verify", "model-experts-0.33", "--dense", "model"]) == 0
    assert AutoConfig.from_pretrained("model-experts-0.33").num_local_experts == 4


def test_a_plan_says_why_experts_can_not_be_removed(text_file, tmp_path, capsys):
    family_model("jetmoe").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    flags = ["--pattern", "experts:0.5", *QUICK, "--calibration", str(text_file)]

    assert main(["prune", str(tmp_path / "dense"), "--dry-run", *flags]) == 1

    reason = (
        "JetMoeForCausalLM can't lose experts: model.layers.0 keeps its experts in several modules"
    )
    assert reason in capsys.readouterr().err


def test_a_rounded_share_is_printed_beside_the_share_that_was_asked_for(
    text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    tiny_llama(num_hidden_layers=3).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    flags = ["--pattern", "layers:0.32", "--method", "wanda", *QUICK, "--calibration", text_file]

    assert main(["prune", "model", *map(str, flags)]) == 0

    removed = "1 of 3 decoder layers (33.33%; asked for: 32%)"
    output = capsys.readouterr()
    assert f"removed      {removed}\n" in output.err
    assert "saved to model-layers-0.33\n" in output.out
    assert f"| removed | {removed} |" in (tmp_path / "model-layers-0.33" / "README.md").read_text()


def test_a_share_that_would_be_rounded_by_more_than_a_tenth_is_refused_before_any_work(
    tiny_folder, text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = ["--pattern", "heads:0.3", *QUICK, "--calibration", str(text_file)]

    assert main(["prune", str(tiny_folder), *flags]) == 1

    assert "Pass a possible share: 0.5 (1 of 2)." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
