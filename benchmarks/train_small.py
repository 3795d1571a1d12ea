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
    """Files with what is trained on, and with what is held out of it."""
    trained, held_out = [], []
    for source in sources:
        text = load_text(source, "calibration").joined
        cut = text.index("\n\n", math.ceil(len(text) * (1 - HELD_OUT)))
        for part, role, files in (
            (text[:cut], "trained", trained),
            (text[cut:], "held-out", held_out),
        ):
            files.append(folder / "texts" / f"{Path(source).stem}-{role}.txt")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            files[-1].write_bytes(part.encode())
    return trained, held_out


def train_tokenizer(files: list[Path], vocabulary: int, folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(
        [str(file) for file in files],
        vocab_size=vocabulary,
        special_tokens=[END],
        show_progress=False,
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END).save_pretrained(
        folder
    )
    return AutoTokenizer.from_pretrained(folder)


def new_model(arguments: Namespace) -> PreTrainedModel:
    sizes = {
        "hidden_size": arguments.hidden,
        "num_hidden_layers": arguments.layers,
        "tie_word_embeddings": True,
    }
    sizes |= {
        "num_attention_heads": arguments.hidden // 32,
        "max_position_embeddings": arguments.sequence_length,
    }
    sizes |= {"vocab_size": arguments.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    if arguments.architecture == "gpt_neox":
        config: PreTrainedConfig = GPTNeoXConfig(
            intermediate_size=arguments.ffn, use_parallel_residual=False, **sizes
        )
    elif arguments.architecture == "gemma3":
        sizes |= {"num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32}
        config = Gemma3TextConfig(intermediate_size=arguments.ffn, **sizes)
    else:
        sizes |= {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_key_value_heads": arguments.hidden // 64,
        }
        config = MixtralConfig(
            intermediate_size=arguments.ffn,
            output_router_logits=True,
            router_aux_loss_coef=0.02,
            **sizes,
        )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(
    model: PreTrainedModel, ids: Tensor, held_out: dict[str, Tensor], arguments: Namespace
) -> dict[str, Any]:
    """AdamW, warm-up and a cosine on windows from random places of `ids` [tokens]; losses in nats a token."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.steps // 20, arguments.steps)
    # All places are drawn before the first step, so that a resumed run goes on with those that are left.
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.steps, arguments.batch_size)
    places = torch.randint(len(ids) - arguments.sequence_length, shape, generator=generator)
    checkpoint = arguments.folder / "training.pt"
    record: dict[str, Any] = {
        "settings": settings_of(arguments, "folder"),
        "versions": library_versions(),
    }
    record |= {"parameters": model.num_parameters(), "tokens": len(ids), "rows": []}
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        if saved["record"]["settings"] != record["settings"]:
            raise SystemExit(
                f"{arguments.folder} holds a run with other settings: pass another --folder."
            )
        record, first = saved["record"], saved["step"]
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(saved[name])
    losses: list[float] = []
    for step in (
        bar := trange(first, arguments.steps, initial=first, total=arguments.steps, mininterval=5)
    ):
        batch = torch.stack(
            [ids[place : place + arguments.sequence_length] for place in places[step].tolist()]
        )
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % arguments.every == 0 or step + 1 == arguments.steps:
            model.eval()
            found = {
                n: math.log(evaluate_perplexity(model, w, progress=False).perplexity)
                for n, w in held_out.items()
            }
            record["rows"].append(
                {"step": step + 1, "training": sum(losses) / len(losses), "held_out": found}
            )
            bar.write(json.dumps(record["rows"][-1]))
            losses.clear()
            model.save_pretrained(arguments.folder)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "record": record,
            }
            torch.save(
                state | {"schedule": schedule.state_dict(), "step": step + 1},
                unfinished := checkpoint.with_suffix(".new"),
            )
            unfinished.replace(checkpoint)
    return record


def main() -> None:
    helps = {
        "texts": "text sources; the last tenth of each is held out",
        "folder": "where model, tokenizer, texts and checkpoint are written",
        "architecture": "mixtral, gpt_neox or gemma3",
        "ffn": "intermediate channels of an expert, or of an MLP",
        "bfloat16": "products in bfloat16",
        "every": "steps from checkpoint to checkpoint",
        "max_windows": "held-out windows of every text to measure on",
    }
    sizes = {
        "hidden": 256,
        "layers": 4,
        "ffn": 384,
        "vocabulary": 4096,
        "sequence_length": 512,
        "max_windows": 16,
    }
    schedule = {"steps": 1200, "batch_size": 4, "rate": 2e-3, "every": 100, "seed": 0, "threads": 1}
    schedule |= {"bfloat16": False}
    files = {"folder": Path("runs/mixture"), "output": Path("runs/train_small.json")}
    arguments = parse_arguments(
        __doc__, "texts", helps=helps, architecture="mixtral", **sizes, **schedule, **files
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
    windows = {
        file.stem: evaluation_windows(
            tokenizer,
            load_text(str(file), "test"),
            arguments.sequence_length,
            arguments.max_windows,
        )
        for file in held_out
    }
    record = train(new_model(arguments), ids, windows, arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
