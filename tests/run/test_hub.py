import hashlib
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from folder_files import bytes_of
from hub_standin import HubStandIn, hub_fixture, run_with_hub  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_fista.run.checkpoints.output import new_output, write_about
from optimum_fista.run.hub import push_folder

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
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors", "reports/layer 0.json"]
    (folder / "fista" / "files.json").write_text(json.dumps(dict.fromkeys(names)))
    return folder


def push(hub: HubStandIn, folder: Path, tmp_path: Path, repo_id=REPO_ID, **options) -> CompletedProcess:
    call = f"push_folder({str(folder)!r}, {repo_id!r}, **{options!r})"
    return run_with_hub(hub, f"from optimum_fista.run.hub import push_folder\nprint({call})", tmp_path)


def printed(process: CompletedProcess) -> str:
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def failure(process: CompletedProcess) -> str:
    """Return the last exception of the traceback of a process that failed."""
    assert process.returncode == 1
    return process.stderr.rpartition("Traceback")[2]


def test_repository_holds_the_folder_and_loads_bit_equal(hub, model_folder, tmp_path):
    url = printed(push(hub, model_folder, tmp_path))
    assert hub.files(REPO_ID) == bytes_of(model_folder)
    assert url == f"{hub.endpoint}/{REPO_ID}/commit/{hub.repositories[REPO_ID].branches['main']}"

    load = f"""
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained({REPO_ID!r}).state_dict()
        saved = load_file({str(model_folder / "model.safetensors")!r})
        print(loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved))
    """
    assert printed(run_with_hub(hub, load, tmp_path)) == "True"
    assert any(r.startswith(f"GET /{REPO_ID}/resolve/") and r.endswith("/model.safetensors") for r in hub.requests)


def test_revision_is_a_branch_of_its_own(hub, model_folder, tmp_path):
    for _ in range(2):  # absent, then present
        printed(push(hub, model_folder, tmp_path, revision="sparse/2:4", private=True))
    assert hub.repositories[REPO_ID].private
    assert hub.files(REPO_ID) == {}
    assert hub.files(REPO_ID, "sparse/2:4") == bytes_of(model_folder)

    download = f"from huggingface_hub import snapshot_download as f\nprint(f({REPO_ID!r}, revision='sparse/2:4'))"
    snapshot = Path(printed(run_with_hub(hub, download, tmp_path)))
    assert bytes_of(snapshot).items() >= bytes_of(model_folder).items()


def test_a_second_push_sends_only_what_changed(hub, model_folder, tmp_path):
    first = printed(push(hub, model_folder, tmp_path, repo_id="tiny-llama"))
    assert f"/{REPO_ID}/" in first  # the namespace is that of the token
    hub.requests.clear()
    assert printed(push(hub, model_folder, tmp_path)) == first
    assert not [request for request in hub.requests if "/commit/" in request or request.startswith("PUT")]


def test_weights_and_measurements_of_an_earlier_model_are_deleted(hub, model, model_folder, tmp_path):
    old, new = shutil.copytree(model_folder, tmp_path / "old"), tmp_path / "sharded"
    write_about(old / "fista" / "evaluation.json", "[]")
    printed(push(hub, old, tmp_path))
    assert "fista/evaluation.json" in hub.files(REPO_ID)
    with new_output(new, False) as folder:
        model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(new.glob("*.safetensors"))) > 1
    printed(push(hub, new, tmp_path))
    kept = {path: data for path, data in bytes_of(old).items() if not path.startswith(("fista/", "model."))}
    assert hub.files(REPO_ID) == kept | bytes_of(new)


def test_files_of_others_stay_here(hub, model_folder, tmp_path):
    folder, notes = tmp_path / "pruned", {"notes.txt", "fista/mine.txt", "[a-z]*.json", "mine.safetensors"}
    shutil.copytree(model_folder, folder)
    for name in notes:
        (folder / name).write_text("private")
    process = push(hub, folder, tmp_path)
    printed(process)
    assert hub.files(REPO_ID).keys() == bytes_of(folder).keys() - notes
    shown = next(line for line in process.stderr.splitlines() if line.startswith("Not uploaded"))
    assert all(name in shown for name in notes)
    assert "README.md" not in shown
    hub.repositories.clear()
    hub.broken = "/commit/"
    message = failure(push(hub, folder, tmp_path))
    for name in ("notes.txt", "'[[]a-z][*].json'"):
        assert f"--exclude {name}" in message


def test_a_card_that_the_hub_refuses_is_one_error_before_anything_is_uploaded(hub, model_folder, tmp_path):
    hub.refused_in_cards = ["license"]
    message = failure(push(hub, model_folder, tmp_path))
    assert f"ValueError: the metadata of the model card '{model_folder}/README.md' is not valid: Invalid" in message
    assert '"license" is not allowed. Mend it between the lines of --- at its top; nothing was uploaded.' in message
    assert hub.repositories == {}
    assert hub.requests == ["POST /api/validate-yaml"]


def test_a_card_that_no_one_can_read_is_the_same_error(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "pruned")
    for metadata in ("a: [", "- a", "model-index: 3"):
        (folder / "README.md").write_text(f"---\n{metadata}\n---\n")
        with pytest.raises(ValueError, match=r"metadata of the model card .* is not valid"):
            push_folder(folder, REPO_ID)


def test_refused_token_names_the_safe_folder(hub, model_folder, tmp_path):
    before = bytes_of(model_folder)
    message = failure(push(hub, model_folder, tmp_path, token="hf_wrong"))
    assert message.count("OSError: ") == 1
    for part in ("401", "Invalid credentials", f"safe at {model_folder}", f"`hf upload {REPO_ID} '{model_folder}'`"):
        assert part in message
    assert "hf_wrong" not in message
    assert hub.repositories == {}
    assert bytes_of(model_folder) == before


def test_what_is_suggested_after_a_private_push_keeps_it_private(hub, model_folder, tmp_path):
    hub.broken = "/commit/"
    message = failure(push(hub, model_folder, tmp_path, private=True))
    assert f"`hf upload {REPO_ID} '{model_folder}' --private`" in message


@pytest.mark.parametrize("broken", ["/api/repos/create", "/branch/", "/commit/"])
def test_failure_at_any_step_can_be_retried(hub, model_folder, tmp_path, broken):
    hub.broken = broken
    message = failure(push(hub, model_folder, tmp_path, revision="sparse"))
    assert "OSError: Pushing to 'tester/tiny-llama' failed" in message
    assert f"`hf upload {REPO_ID} '{model_folder}' --revision sparse`" in message
    assert "broken on purpose" in message
    hub.broken = None
    printed(push(hub, model_folder, tmp_path, revision="sparse"))
    assert hub.files(REPO_ID, "sparse") == bytes_of(model_folder)


def test_foreign_namespace_and_unreachable_hub(hub, model_folder, tmp_path):
    assert "403 Forbidden" in failure(push(hub, model_folder, tmp_path, repo_id="someone/tiny-llama"))
    with HubStandIn() as stopped:
        pass
    assert f"safe at {model_folder}" in failure(push(stopped, model_folder, tmp_path))


def test_private_is_not_ignored_for_an_existing_public_repository(hub, model_folder, tmp_path):
    printed(push(hub, model_folder, tmp_path))
    hub.requests.clear()
    message = failure(push(hub, model_folder, tmp_path, private=True))
    assert "ValueError: private=True was passed, but 'tester/tiny-llama' exists with private=False" in message
    assert not [request for request in hub.requests if "/preupload/" in request]


@pytest.mark.parametrize("missing", ["fista/files.json", "config.json", "model.safetensors"])
def test_incomplete_folder_is_refused(model_folder, tmp_path, missing):
    folder = shutil.copytree(model_folder, tmp_path / "pruned")
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=r"has no .* of optimum-fista: pass a folder that it wrote"):
        push_folder(folder, REPO_ID)


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "https://hf.co/a/b", "a--b", "a/b.git", "with space"])
def test_repo_id_that_is_no_name_is_refused(model_folder, repo_id):
    with pytest.raises(ValueError, match=r"^repo_id='.* pass 'namespace/name'") as caught:
        push_folder(model_folder, repo_id)
    assert caught.value.__suppress_context__


def test_standin_refuses_what_the_hub_refuses(hub):
    def status(method: str, path: str, body: bytes, token: str | None = "hf_test") -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(hub.endpoint + path, body, headers, method=method)
        try:
            return urllib.request.urlopen(request).status
        except urllib.error.HTTPError as error:
            return error.code

    def commit(key: str, **value: object) -> int:
        return status("POST", f"/api/models/{REPO_ID}/commit/main", json.dumps({"key": key, "value": value}).encode())

    create = json.dumps({"name": "tiny-llama", "organization": "tester", "visibility": "private"}).encode()
    oid = hashlib.sha256(b"weights").hexdigest()
    announce = json.dumps({"objects": [{"oid": oid, "size": 7}]}).encode()
    assert status("POST", "/api/repos/create", create, token=None) == 401
    assert status("POST", "/api/repos/create", create) == 200
    assert status("GET", f"/api/models/{REPO_ID}", b"", token=None) == 401
    assert status("PUT", f"/lfs/{oid}", b"weights") == 403
    assert status("POST", f"/{REPO_ID}.git/info/lfs/objects/batch", announce) == 200
    assert commit("lfsFile", path="a.safetensors", oid=oid, size=7) == 400
    assert status("PUT", f"/lfs/{oid}", b"other weights", token=None) == 400
    assert status("PUT", f"/lfs/{oid}", b"weights", token=None) == 200
    assert commit("lfsFile", path="a.safetensors", oid=oid, size=8) == 400
    assert commit("file", path="a.safetensors", content="d2VpZ2h0cw==") == 400
    assert commit("lfsFile", path="a.safetensors", oid=oid, size=7) == 200
    assert hub.files(REPO_ID) == {"a.safetensors": b"weights"}
