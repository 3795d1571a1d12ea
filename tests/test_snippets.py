"""Python snippets of the README and the docs run on a tiny model; links lead somewhere, names exist."""

import pkgutil
import re
from unittest.mock import patch

import pytest
from doc_pages import PAGES, QUICKSTART, python_snippets
from hub_standin import HubStandIn, connect
from saved_models import prune_and_save
from tiny_llama import TEXT, save_tiny_folder, tiny_llama, tiny_tokenizer, tiny_tokens

from optimum_fista.evaluate.verification import verify_checkpoint
from optimum_fista.folder.packed_folder import pack_folder
from optimum_fista.solve.methods import METHODS

SNIPPETS = [
    pytest.param(snippet, id=f"{page.stem}-{number}")
    for page in PAGES
    if page != QUICKSTART  # test_quickstart.py runs it in its order
    for number, snippet in enumerate(python_snippets(page))
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_folder(tmp_path / "hub-id-or-folder")
    (tmp_path / "text.txt").write_text(3 * TEXT)
    names = {
        "model": tiny_llama(),
        "calib_dataloader": tiny_tokens().split(4),
        "batches_of_ids": tiny_tokens().split(4),
        "tokenizer": tiny_tokenizer(),
    }
    names["train_dataset"] = [{"input_ids": row, "labels": row} for row in tiny_tokens()]
    if "tensorboard" in snippet:
        pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install tensorboard")
    if "torch.onnx" in snippet:
        pytest.importorskip(
            "onnxscript", reason="needs ONNX: pip install onnx onnxscript onnxruntime"
        )
        pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
    if '"pruned-2-4"' in snippet or '"model-50-packed"' in snippet:
        prune_and_save(tiny_llama(), tmp_path / "pruned-2-4", pattern="2:4", method="wanda")
        pack_folder(tmp_path / "pruned-2-4", tmp_path / "model-50-packed")

    # A snippet registers a method of its own, which other tests should not see.
    with HubStandIn(user="your-name") as hub, patch.dict(METHODS):
        connect(hub, monkeypatch)
        exec(compile(snippet, "snippet", "exec"), names)

    if "your-name/" in snippet:
        (repository,) = hub.repositories
        assert "fista/masks.safetensors" in hub.files(repository)
    for folder in ("pruned", "pruned-from-files", "retrained-2-4"):
        if f'"{folder}"' in snippet:
            assert verify_checkpoint(tmp_path / folder).num_operators == 14
    if '"model-50-packed"' in snippet:
        weight = names["model"].model.layers[0].mlp.up_proj.weight
        assert (weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_names_of_the_docs_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    rooms = "solve|packed|model|estimate|prune|folder|evaluate|train|page|cli"
    for dotted in re.findall(rf"`((?:{rooms})\.(?!safetensors)[\w.]+)`", text):
        pkgutil.resolve_name(f"optimum_fista.{dotted}")
