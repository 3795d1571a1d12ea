"""Every source of text goes into every command, the Python functions, and `FistaOnLoadConfig`."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from rare_tokens import bpe_tokenizer, save
from tiny_llama import TEXT, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_fista import FistaPruner, FistaPruningConfig, calibration_tokens
from optimum_fista.cli.main import main
from optimum_fista.on_load import FistaOnLoadConfig
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import calibration_windows, evaluation_windows

TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
SENTENCES = [sentence for sentence in TEXT.split(". ") if sentence]
CONVERSATIONS = [
    [{"role": "user", "content": "what is deep?"}, {"role": "assistant", "content": sentence}]
    for sentence in SENTENCES
]
WRITTEN = f"user: what is deep?\nassistant: {SENTENCES[0]}\n"


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A dense model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_llama().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """Stands for the Hub: `hub.sets` are rows by repository and split; `hub.calls` what was asked."""
    hub = SimpleNamespace(sets={}, calls=[])

    def load_dataset(repository, configuration=None, *, streaming):
        assert streaming
        hub.calls.append((repository, configuration))
        return datasets.IterableDatasetDict(
            {
                split: datasets.Dataset.from_list(rows).to_iterable_dataset()
                for split, rows in hub.sets[repository].items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    return hub


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


SOURCES = ("txt", "jsonl", "messages", "hub", "hub messages")


@pytest.fixture
def source(request, hub, tmp_path):
    """What a user passes for one of `SOURCES`."""
    texts = [{"text": sentence} for sentence in SENTENCES]
    conversations = [{"messages": turns} for turns in CONVERSATIONS]
    hub.sets["tester/texts"] = {"train": texts, "test": texts}
    hub.sets["tester/chat"] = {"train_sft": conversations, "test_sft": conversations}
    (tmp_path / "sea.txt").write_text(TEXT)
    (tmp_path / "sea.jsonl").write_text(lines(texts))
    (tmp_path / "chat.jsonl").write_text(lines(conversations))
    return {
        "txt": str(tmp_path / "sea.txt"),
        "jsonl": str(tmp_path / "sea.jsonl"),
        "messages": str(tmp_path / "chat.jsonl"),
        "hub": "tester/texts",
        "hub messages": "tester/chat",
    }[request.param]


def every_source(test):
    return pytest.mark.parametrize("source", SOURCES, indirect=True)(test)


@every_source
def test_tokens_in_python(source):
    model = tiny_llama()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE

    tokens = calibration_tokens(source, model, tokenizer, 4, 16)
    windows = evaluation_windows(tokenizer, load_text(source, "test"), 16, 4)

    assert tokens.shape == windows.shape == (4, 16)
    is_chat = "chat" in source
    first = WRITTEN if is_chat else TEXT
    assert tokenizer.decode(windows[0]) == first[:16]


@every_source
def test_prune_and_measure(source, chat_folder, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(lines([{"messages": CONVERSATIONS[0]} for _ in range(100)]))
    command = ["prune", str(chat_folder), "--output", str(tmp_path / "out"), "--method", "wanda"]
    command += ["--calibration", source, "--num-samples", "8", "--sequence-length", "16"]

    assert main([*command, "--measure", str(held_out), "--device", "cpu"]) == 0

    assert (tmp_path / "out" / "config.json").exists()


@every_source
def test_remove_tokens(source, tmp_path):
    folder = save(tmp_path / "dense")
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    command = ["prune", str(folder), "--output", str(tmp_path / "out"), "--device", "cpu"]

    assert main([*command, "--pattern", "vocab:unused", "--calibration", source]) == 0

    assert (tmp_path / "out" / "fista" / "vocabulary.json").exists()


@every_source
def test_recover(source, chat_folder, tmp_path):
    command = ["recover", str(chat_folder), "--output", str(tmp_path / "out"), "--train", "norms"]
    command += ["--calibration", source, "--tokens", "64", "--sequence-length", "16"]

    assert main([*command, "--device", "cpu", "--compute-dtype", "float32"]) == 0

    assert (tmp_path / "out" / "config.json").exists()


@every_source
def test_evaluate(source, chat_folder, capsys):
    command = ["evaluate", str(chat_folder), "--text", source, "--sequence-length", "16"]

    assert main([*command, "--max-windows", "4", "--device", "cpu"]) == 0

    assert f"on {source}: 4 windows of 16 tokens" in capsys.readouterr().out


@every_source
def test_prune_on_load(source, chat_folder):
    pruner = FistaPruner(FistaPruningConfig(method="wanda"), progress=False)
    options = FistaOnLoadConfig(pruner, source, num_samples=4, sequence_length=16)

    model = AutoModelForCausalLM.from_pretrained(chat_folder, quantization_config=options)

    assert torch.count_nonzero(model.model.layers[0].mlp.up_proj.weight) == 48 * 32 / 2


def test_a_conversation_is_written_by_the_models_own_template(tmp_path):
    file = tmp_path / "chat.jsonl"
    parts = [{"type": "text", "text": "the sea"}, {"type": "text", "text": "is deep"}]
    file.write_text(
        lines(
            [
                {"messages": [{"role": "user", "content": "hi"}]},
                {"text": "plain"},
                {"messages": [{"role": "user", "content": parts}]},
            ]
        )
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE

    text = load_text(str(file), "calibration").written_by(tokenizer)

    assert text.documents == ("user: hi\n", "plain", "user: the sea\nis deep\n")


def test_conversations_need_a_chat_template(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(lines([{"messages": CONVERSATIONS[0]}]))
    text = load_text(str(file), "calibration")

    with pytest.raises(
        ValueError, match=r"'chat\.jsonl' has conversations .* has no chat template"
    ):
        calibration_windows(tiny_tokenizer(), text, 1, 16, 0)


def test_a_template_that_refuses_a_conversation_gives_its_number(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(lines([{"messages": CONVERSATIONS[0]}]))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"

    with pytest.raises(ValueError, match=r"refuses conversation 1 .*roles must alternate"):
        load_text(str(file), "calibration").written_by(tokenizer)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        [{"role": "user"}],
        [{"content": "hi"}],
        [{"role": "user", "content": [{"type": "image"}]}],
    ],
)
def test_messages_of_another_form_are_refused_with_the_line(messages, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(lines([{"text": "a"}, {"messages": messages}]))

    with pytest.raises(
        ValueError, match=r"chat\.jsonl', line 2: found .*must be a list of objects"
    ):
        load_text(str(file), "calibration")


@pytest.mark.parametrize(
    ("name", "call", "documents"),
    [
        ("tester/set", ("tester/set", None), ("a", "b")),
        ("tester/set/large", ("tester/set", "large"), ("a", "b")),
        ("tester/set:other", ("tester/set", None), ("c",)),
        ("tester/set:train:title", ("tester/set", None), ("t", "u")),
        ("tester/set::title", ("tester/set", None), ("t", "u")),
    ],
)
def test_configuration_split_and_column_are_given_or_found(name, call, documents, hub):
    hub.sets["tester/set"] = {
        "other": [{"title": "v", "text": "c"}],
        "train": [{"title": "t", "text": "a"}, {"title": "u", "text": "b"}],
    }

    text = load_text(name, "calibration")

    assert hub.calls == [call]
    assert text.documents == documents
    assert text.name == name


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("tester/set:none", "calibration", "has no split 'none': pass one of train, more"),
        ("tester/set::none", "calibration", "has no column 'none': pass one of a, b"),
        ("tester/set", "calibration", r"not clear which column .*name one of a, b, such as"),
        ("tester/set", "test", r"none of the splits .* has a usual name: name one of train, more"),
    ],
)
def test_what_is_not_there_is_said_with_what_to_pass(name, split, message, hub):
    rows = [{"a": "x", "b": "y"}]
    hub.sets["tester/set"] = {"train": rows, "more": rows}

    with pytest.raises(ValueError, match=message):
        load_text(name, split)


def test_only_the_beginning_of_a_data_set_is_read(hub, monkeypatch):
    monkeypatch.setattr(
        "optimum_fista.text.hub_texts._MOST_CHARACTERS", {"calibration": 5, "test": 3}
    )
    rows = [{"text": "ab"}, {"text": ""}, {"text": "cd"}, {"text": "ef"}, {"text": "gh"}]
    hub.sets["tester/set"] = {"train": rows, "test": rows}

    assert load_text("tester/set", "calibration").documents == ("ab", "cd", "ef")
    assert load_text("tester/set", "test").documents == ("ab", "cd")


def test_a_hub_out_of_reach_gives_one_line(monkeypatch, chat_folder, capsys):
    def no_route(*_, **__):
        raise OSError("no route to host")

    def not_cached(*_, **__):
        raise ConnectionError("offline mode\nis enabled")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_route)
    monkeypatch.setattr(datasets, "load_dataset", not_cached)

    assert main(["evaluate", str(chat_folder), "--text", "tester/set"]) == 1

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: source='tester/set': could not load 'tester/set' from the Hub")
    assert "offline mode is enabled" in line


def test_the_same_split_is_not_calibrated_and_measured_on(hub, chat_folder, capsys):
    hub.sets["tester/texts"] = {"train": [{"text": sentence} for sentence in SENTENCES]}
    name = "tester/texts:train"

    assert main(["prune", str(chat_folder), "--calibration", name, "--measure", name]) == 1

    assert "'tester/texts:train' is among the calibration text" in capsys.readouterr().err
