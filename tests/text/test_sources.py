import hashlib
import sys
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import constants

from optimum_fista.text.sources import load_text


@pytest.fixture
def hub(monkeypatch):
    """Stands for the Hub: serves the rows put into it and keeps the arguments it was called with."""
    hub = SimpleNamespace(rows={}, calls=[])

    def load_dataset(*args, **kwargs):
        hub.calls.append((args, kwargs))
        return datasets.Dataset.from_dict(hub.rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    return hub


def test_txt_is_one_document_verbatim(tmp_path):
    content = "﻿ first\r\nsecond\n\n\tthird\rfourth \n"
    path = tmp_path / "some text.txt"
    path.write_bytes(content.encode())

    text = load_text(str(path), "test")

    assert text.documents == (content,)
    assert text.name == "some text.txt"
    assert text.sha256 == hashlib.sha256(content.encode()).hexdigest()


def test_jsonl_has_one_document_per_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(
        '{"text": "a\\nb", "id": 1}\n\n{"text": "c\u2028d"}\r\n{"text": ""}', encoding="utf-8"
    )

    text = load_text(str(path), "calibration")

    assert text.documents == ("a\nb", "c\u2028d", "")
    assert text.joined == "a\nb" + text.separator + "c\u2028d" + text.separator


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{'text': 'a'}", "found {'text': 'a'}; every line"),
        ('{"content": "a"}', 'found {"content": "a"}; every line'),
        ('{"text": 3}', 'found {"text": 3}; every line must be'),
        (r'{"text": "a\ud83d b"}', r"character 2 of the text, '\\ud83d', is half of a surrogate"),
    ],
)
def test_the_error_of_a_jsonl_file_gives_the_line(tmp_path, line, complaint):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n")

    with pytest.raises(ValueError, match=f"lines.jsonl', line 3: {complaint}"):
        load_text(str(path), "calibration")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b" \n", "is empty"),
        ("a.jsonl", b'\n{"text": " "}\n', "is empty"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
    ],
)
def test_a_file_without_text_is_refused(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(ValueError, match=complaint):
        load_text(str(path), "calibration")


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"source='nowhere\.txt'.*pass a path"):
        load_text("nowhere.txt", "calibration")


def test_the_texts_of_pydoc_follow_the_order_of_their_keys(monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", {"with": "first", "assert": "second"})

    text = load_text("pydoc", "calibration")

    assert text.documents == ("second", "first")


def test_an_unknown_source_is_refused():
    with pytest.raises(
        ValueError, match=r"source='notes\.md' is not known; pass a path that ends in \.txt"
    ):
        load_text("notes.md", "calibration")


def test_an_unknown_split_is_refused():
    with pytest.raises(
        ValueError, match="split='train' is not known; pass 'calibration' or 'test'"
    ):
        load_text("pydoc", "train")


WIKITEXT = (("Salesforce/wikitext",), {"name": "wikitext-2-raw-v1"})
C4 = (("allenai/c4",), {})
PTB = (("ptb-text-only/ptb_text_only",), {"revision": "refs/convert/parquet"})


@pytest.mark.parametrize(
    ("source", "split", "call", "hub_split", "file", "column", "documents", "separator"),
    [
        ("wikitext2", "test", WIKITEXT, "test", None, "text", ("a\n\nb\n\n",), "\n\n"),
        (
            "c4",
            "calibration",
            C4,
            "train",
            "en/c4-train.00000-of-01024.json.gz",
            "text",
            ("a", "b", ""),
            " ",
        ),
        (
            "c4",
            "test",
            C4,
            "validation",
            "en/c4-validation.00000-of-00008.json.gz",
            "text",
            ("a b ",),
            " ",
        ),
        ("ptb", "test", PTB, "test", "penn_treebank/test/0000.parquet", "sentence", ("a b ",), " "),
    ],
)
def test_texts_of_the_hub_are_read_as_in_the_literature(
    hub, source, split, call, hub_split, file, column, documents, separator
):
    hub.rows = {"other": ["x", "y", "z"], column: ["a", "b", ""]}

    text = load_text(source, split)

    positional, options = call
    options = options | {"split": hub_split}
    if file is not None:
        options["data_files"] = {hub_split: file}
    assert hub.calls == [(positional, options)]
    assert text.name == source
    assert text.documents == documents
    assert text.separator == separator
    is_test_of_c4 = (source, split) == ("c4", "test")
    assert text.max_windows == (256 if is_test_of_c4 else None)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(
        ImportError,
        match=r"pip install '\.\[datasets\]'` in a clone of optimum-fista, or pass a local \.txt",
    ):
        load_text("c4", "calibration")


def test_a_hub_out_of_reach_is_asked_once_and_gives_one_error(monkeypatch):
    requests = []
    offline = []

    def dataset_info(*arguments, **options):
        requests.append(arguments)
        raise OSError("no route to host")

    def load_dataset(*args, **kwargs):
        offline.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        raise ConnectionError("it is not in the cache")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    with pytest.raises(
        ConnectionError, match=r"'Salesforce/wikitext'.*not in the cache.*pass a local \.txt"
    ):
        load_text("wikitext2", "test")

    assert len(requests) == 1
    assert offline == [(True, True)]
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_text_in_the_cache_is_read_without_a_network(hub, monkeypatch):
    def dataset_info(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    hub.rows = {"text": ["a", "b"]}

    text = load_text("wikitext2", "calibration")

    assert text.documents == ("a b",)
