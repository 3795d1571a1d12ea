"""Pushing of a model folder to a stand-in for the Hub: one commit with the files of the model, or a clear error."""

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from folder_files import bytes_of
from hub_standin import HubStandIn, connect, hub_fixture, run_with_hub  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_fista.folder.hub import push_folder, require_push
from optimum_fista.folder.output import new_output, write_about

REPO_ID = "tester/tiny-llama"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))


@pytest.fixture(scope="module")
def model_folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model folder")
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (folder / "reports").mkdir()
    (folder / "reports" / "layer 0.json").write_text('{"relative_error": 0.1}')
    (folder / "fista").mkdir()
    names = [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "reports/layer 0.json",
    ]
    (folder / "fista" / "files.json").write_text(json.dumps(dict.fromkeys(names)))
    return folder


def push(
    hub: HubStandIn, folder: Path, tmp_path: Path, repo_id=REPO_ID, **options
) -> CompletedProcess:
    """Push a folder in a process of its own, which talks to the stand-in; `options` are those of `push_folder`."""
    call = f"push_folder({str(folder)!r}, {repo_id!r}, **{options!r})"
    return run_with_hub(
        hub, f"from optimum_fista.folder.hub import push_folder\nprint({call})", tmp_path
    )


def printed(process: CompletedProcess) -> str:
    """Return what a process printed that succeeded."""
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def failure(process: CompletedProcess) -> str:
    """Return the last exception of the traceback of a process that failed."""
    assert process.returncode == 1
    return process.stderr.rpartition("Traceback")[2]


def test_the_repository_holds_the_files_of_the_folder(hub, model_folder, tmp_path):
    url = printed(push(hub, model_folder, tmp_path))

    assert hub.files(REPO_ID) == bytes_of(model_folder)
    assert url == f"{hub.endpoint}/{REPO_ID}/commit/{hub.repositories[REPO_ID].branches['main']}"


def test_a_revision_is_pushed_as_a_branch_of_its_own(hub, model_folder, tmp_path):
    for _ in range(2):  # absent, then present
        printed(push(hub, model_folder, tmp_path, revision="sparse/2:4", private=True))

    assert hub.repositories[REPO_ID].private
    assert hub.files(REPO_ID) == {}
    assert hub.files(REPO_ID, "sparse/2:4") == bytes_of(model_folder)


def test_weights_and_the_page_of_an_earlier_model_are_deleted(hub, model, model_folder, tmp_path):
    old = shutil.copytree(model_folder, tmp_path / "old")
    write_about(old / "fista" / "report.html", "[]")
    printed(push(hub, old, tmp_path))
    assert "fista/report.html" in hub.files(REPO_ID)
    new = tmp_path / "sharded"
    with new_output(new, False) as folder:
        model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(new.glob("*.safetensors"))) > 1

    printed(push(hub, new, tmp_path))

    other_files = {
        path: data
        for path, data in bytes_of(old).items()
        if not path.startswith(("fista/", "model."))
    }
    assert hub.files(REPO_ID) == other_files | bytes_of(new)


def test_files_that_the_package_did_not_write_are_not_uploaded(hub, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "pruned")
    notes = {"notes.txt", "fista/mine.txt", "[a-z]*.json", "mine.safetensors"}
    for name in notes:
        (folder / name).write_text("private")

    process = push(hub, folder, tmp_path)

    assert process.returncode == 0, process.stderr
    assert hub.files(REPO_ID).keys() == bytes_of(folder).keys() - notes
    warning = next(line for line in process.stderr.splitlines() if line.startswith("Not uploaded"))
    assert all(name in warning for name in notes)
    assert "README.md" not in warning


def test_a_card_that_the_hub_refuses_gives_one_error_before_anything_is_uploaded(
    hub, model_folder, tmp_path
):
    hub.refused_in_cards = ["license"]

    message = failure(push(hub, model_folder, tmp_path))

    assert "OSError: Pushing to 'tester/tiny-llama' failed" in message
    assert 'Invalid metadata in README.md.\n- "license" is not allowed' in message
    assert hub.files(REPO_ID) == {}
    assert not any("/preupload/" in request for request in hub.requests)


@pytest.mark.parametrize("broken", ["/api/repos/create", "/branch/", "/commit/"])
def test_a_push_that_failed_at_any_step_can_be_retried(hub, model_folder, tmp_path, broken):
    hub.broken = broken

    message = failure(push(hub, model_folder, tmp_path, revision="sparse"))

    assert "OSError: Pushing to 'tester/tiny-llama' failed" in message
    assert "broken on purpose" in message

    hub.broken = None
    printed(push(hub, model_folder, tmp_path, revision="sparse"))
    assert hub.files(REPO_ID, "sparse") == bytes_of(model_folder)


@pytest.mark.parametrize(
    ("options", "status"),
    [({"token": "hf_wrong"}, "401"), ({"repo_id": "someone/tiny"}, "403")],
    ids=["token", "namespace"],
)
def test_a_refused_token_or_namespace_gives_one_error(hub, model_folder, tmp_path, options, status):
    message = failure(push(hub, model_folder, tmp_path, **options))

    assert f"safe at {model_folder}" in message
    assert status in message
    assert "hf_wrong" not in message
    assert hub.repositories == {}


def test_a_hub_that_is_not_reached_gives_one_error(model_folder, tmp_path):
    with HubStandIn() as stopped:
        pass

    message = failure(push(stopped, model_folder, tmp_path))

    assert f"safe at {model_folder}" in message


def test_a_push_that_can_work_is_not_refused(hub, monkeypatch):
    connect(hub, monkeypatch)

    require_push(REPO_ID)
    require_push("tiny-llama")


@pytest.mark.parametrize(
    ("repo_id", "options", "reason"),
    [
        ("a/b/c", {}, "is not a repository name"),
        ("someone/tiny", {}, "tester, .* can't write to 'someone'"),
        (REPO_ID, {"token": "hf_wrong"}, "Invalid user token"),
    ],
    ids=["name", "namespace", "token"],
)
def test_what_cannot_be_pushed_is_refused_before_a_run(hub, monkeypatch, repo_id, options, reason):
    connect(hub, monkeypatch)

    with pytest.raises((OSError, ValueError), match=rf"repo_id='{repo_id}'.*{reason}"):
        require_push(repo_id, **options)

    assert all(request.startswith("GET ") for request in hub.requests)


def test_a_token_that_can_only_read_is_refused_before_a_run(hub, monkeypatch):
    connect(hub, monkeypatch)
    hub.role = "read"

    message = rf"repo_id='{REPO_ID}': the token can only read: make one that can write .*HF_TOKEN"
    with pytest.raises(ValueError, match=message):
        require_push(REPO_ID)


def test_a_push_in_offline_mode_is_refused_before_a_run(hub, monkeypatch):
    connect(hub, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    message = r"can't be pushed to, and nothing was done: .*offline mode is enabled"
    with pytest.raises(OSError, match=message):
        require_push(REPO_ID)


def test_a_private_push_to_an_existing_public_repository_is_refused(hub, model_folder, tmp_path):
    printed(push(hub, model_folder, tmp_path))
    hub.requests.clear()

    message = failure(push(hub, model_folder, tmp_path, private=True))

    expected = "private=True was passed, but 'tester/tiny-llama' exists with private=False"
    assert f"ValueError: {expected}" in message
    assert not [request for request in hub.requests if "/preupload/" in request]


@pytest.mark.parametrize("missing", ["fista/files.json", "config.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused(model_folder, tmp_path, missing):
    folder = shutil.copytree(model_folder, tmp_path / "pruned")
    (folder / missing).unlink()

    message = r"has no .* of optimum-fista: pass a folder that it wrote"
    with pytest.raises(ValueError, match=message):
        push_folder(folder, REPO_ID)


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "a--b"])
def test_an_invalid_repo_id_is_refused(model_folder, repo_id):
    with pytest.raises(ValueError, match=r"^repo_id='.* pass 'namespace/name'") as caught:
        push_folder(model_folder, repo_id)

    assert caught.value.__suppress_context__
