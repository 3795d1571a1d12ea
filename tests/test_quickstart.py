"""The quickstart runs from top to bottom, on a tiny model."""

import shlex

import torch
from doc_pages import QUICKSTART, code_blocks, commands
from tiny_llama import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_fista.cli.main import main
from optimum_fista.evaluate.verification import verify_checkpoint


def test_the_quickstart_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("hub-id-or-folder", "model"):
        tiny_llama(max_position_embeddings=512).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)

    for language, text in code_blocks(QUICKSTART):
        if language == "python":
            exec(compile(text, "snippet", "exec"), {})
        for command in (command for command in commands(QUICKSTART) if command in text):
            if command.startswith("optimum-fista "):
                assert main(shlex.split(command.replace("$MODEL", "model"))[1:]) == 0, command

    printed = capsys.readouterr().out
    assert "operators keep their pattern" in printed
    assert printed.count("perplexity ") == 1 + 2  # of the run, and of the two commands
    assert verify_checkpoint(tmp_path / "pruned").num_operators == 14
    weights = (
        AutoModelForCausalLM.from_pretrained("runs/smollm2-50").model.layers[0].mlp.up_proj.weight
    )
    assert torch.count_nonzero(weights) == weights.numel() / 2
