"""Train a small language model from nothing, for measurements that random weights can't give.

`mixtral` is a mixture of 8 experts, 2 a token, balanced by the loss of its family; `gpt_neox` has plain MLPs and
biases; `gemma3` has norms before and after attention and MLP, and a large vocabulary is most of it. The tokenizer is a
byte-level BPE of the same texts. The last tenth of every text, from the next blank line on, is held out: neither model
nor tokenizer sees it. Both parts lie under `texts` in the folder. The same command resumes from the last checkpoint.

    python benchmarks/train_small.py --texts openwebtext.txt,wikitext2-test.txt --folder runs/mixture
    python benchmarks/train_small.py --texts openwebtext.txt,wikitext2-test.txt --folder runs/small --bfloat16 \
        --architecture gpt_neox --hidden 128 --ffn 512 --vocabulary 2048 --sequence-length 256 --batch-size 8 \
        --rate 3e-3 --steps 4000 --every 500
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from shared import parse_arguments, settings_of
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import trange
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.text.sources import load_text
from optimum_fista.text.windows import evaluation_windows
from optimum_fista.versions import library_versions

END = "<|endoftext|>"
HELD_OUT = 0.1


def split_texts(sources: list[str], folder: Path) -> tuple[list[Path], list[Path]]:
    """Write to files what is trained on, and what is held out of it; returns both lists of files."""
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    trained = []
    held_out = []
    for source in sources:
        text = load_text(source, "calibration").joined
        # The end of the text is held out, from the end of a paragraph on.
        cut = text.index("\n\n", math.ceil(len(text) * (1 - HELD_OUT)))
        stem = Path(source).stem
        trained_file = folder / "texts" / f"{stem}-trained.txt"
        trained_file.write_bytes(text[:cut].encode())
        trained.append(trained_file)
        held_out_file = folder / "texts" / f"{stem}-held-out.txt"
        held_out_file.write_bytes(text[cut:].encode())
        held_out.append(held_out_file)
    return trained, held_out


def train_tokenizer(files: list[Path], vocabulary: int, folder: Path) -> PreTrainedTokenizerBase:
    """Train a tokenizer with `vocabulary` tokens on files, and write it to `folder`."""
    bpe = ByteLevelBPETokenizer()
    bpe.train(
        [str(file) for file in files],
        vocab_size=vocabulary,
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def new_model(arguments: Namespace) -> PreTrainedModel:
    """Make a model with random weights, of the architecture and the sizes of the command line."""
    sizes = {
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.ffn,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // 32,
        "max_position_embeddings": arguments.sequence_length,
        "vocab_size": arguments.vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
    }
    config: PreTrainedConfig
    if arguments.architecture == "gpt_neox":
        config = GPTNeoXConfig(use_parallel_residual=False, **sizes)
    elif arguments.architecture == "gemma3":
        config = Gemma3TextConfig(
            num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32, **sizes
        )
    else:
        config = MixtralConfig(
            num_local_experts=8,
            num_experts_per_tok=2,
            num_key_value_heads=arguments.hidden // 64,
            output_router_logits=True,
            router_aux_loss_coef=0.02,
            **sizes,
        )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(
    model: PreTrainedModel, ids: Tensor, held_out: dict[str, Tensor], arguments: Namespace
) -> dict[str, Any]:
    """Train by AdamW, warm-up and a cosine on windows from random places of `ids` [tokens]; returns the record.

    Changes `model`, and writes it with a checkpoint to `arguments.folder` every `arguments.every` steps. A run that was
    interrupted goes on from there. `held_out` are windows [windows, length] by the name of their text. Losses are in
    nats a token.
    """
    optimizer = new_optimizer(model, arguments.rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.steps // 20, arguments.steps)
    # All places are drawn before the first step, so that a resumed run goes on with those that are left.
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.steps, arguments.batch_size)
    places = torch.randint(len(ids) - arguments.sequence_length, shape, generator=generator)

    record: dict[str, Any] = {
        "settings": settings_of(arguments, "folder"),
        "versions": library_versions(),
        "parameters": model.num_parameters(),
        "tokens": len(ids),
        "rows": [],
    }
    checkpoint = arguments.folder / "training.pt"
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    first_step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        if saved["record"]["settings"] != record["settings"]:
            raise SystemExit(
                f"{arguments.folder} holds a run with other settings: pass another --folder."
            )
        record = saved["record"]
        first_step = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    losses: list[float] = []  # since the last row of the record
    bar = trange(
        first_step, arguments.steps, initial=first_step, total=arguments.steps, mininterval=5
    )
    for step in bar:
        starts = places[step].tolist()
        batch = torch.stack([ids[start : start + arguments.sequence_length] for start in starts])
        losses.append(take_step(model, batch, arguments.bfloat16))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

        num_steps = step + 1
        if num_steps % arguments.every == 0 or num_steps == arguments.steps:
            row = {
                "step": num_steps,
                "training": sum(losses) / len(losses),
                "held_out": held_out_losses(model, held_out),
            }
            record["rows"].append(row)
            bar.write(json.dumps(row))
            losses.clear()
            model.save_pretrained(arguments.folder)
            state = {name: part.state_dict() for name, part in parts.items()}
            # A run that is interrupted while it writes keeps the checkpoint before.
            unfinished = checkpoint.with_suffix(".new")
            torch.save(state | {"record": record, "step": num_steps}, unfinished)
            unfinished.replace(checkpoint)
    return record


def new_optimizer(model: PreTrainedModel, rate: float) -> torch.optim.AdamW:
    """Make AdamW with a decay of matrices, and none of vectors such as norms and biases."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def take_step(model: PreTrainedModel, batch: Tensor, in_bfloat16: bool) -> float:
    """Add the gradients of the loss on a batch [sequences, length] to those of `model`, clipped; returns the loss."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
        loss = model(batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss.item()


def held_out_losses(model: PreTrainedModel, held_out: dict[str, Tensor]) -> dict[str, float]:
    """Return the loss on held-out windows, by the name of their text; puts `model` into evaluation mode."""
    model.eval()
    losses = {}
    for name, windows in held_out.items():
        measured = evaluate_perplexity(model, windows, progress=False)
        losses[name] = math.log(measured.perplexity)
    return losses


def main() -> None:
    """Write texts, tokenizer, model and record as the command line says."""
    helps = {
        "texts": "text sources; the last tenth of each is held out",
        "folder": "where model, tokenizer, texts and checkpoint are written",
        "architecture": "mixtral, gpt_neox or gemma3",
        "ffn": "intermediate channels of an expert, or of an MLP",
        "bfloat16": "products in bfloat16",
        "every": "steps from checkpoint to checkpoint",
        "max_windows": "held-out windows of every text to measure on",
    }
    arguments = parse_arguments(
        __doc__,
        "texts",
        helps=helps,
        architecture="mixtral",
        hidden=256,
        layers=4,
        ffn=384,
        vocabulary=4096,
        sequence_length=512,
        max_windows=16,
        steps=1200,
        batch_size=4,
        rate=2e-3,
        every=100,
        seed=0,
        threads=1,
        bfloat16=False,
        folder=Path("runs/mixture"),
        output=Path("runs/train_small.json"),
    )
    if arguments.architecture not in ("mixtral", "gpt_neox", "gemma3"):
        raise SystemExit(
            f"--architecture {arguments.architecture} is not known; pass mixtral, gpt_neox or gemma3."
        )
    torch.set_num_threads(arguments.threads)
    set_seed(arguments.seed)

    trained, held_out = split_texts(arguments.texts, arguments.folder)
    tokenizer = train_tokenizer(trained, arguments.vocabulary, arguments.folder)
    ids = torch.cat([torch.tensor(tokenizer(file.read_text())["input_ids"]) for file in trained])
    windows = {}
    for file in held_out:
        text = load_text(str(file), "test")
        windows[file.stem] = evaluation_windows(
            tokenizer, text, arguments.sequence_length, arguments.max_windows
        )
    record = train(new_model(arguments), ids, windows, arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
