"""Retraining a pruned model for a few minutes: perplexity before and after, by what is trained.

The model is pruned once, saved to `--folder` and loaded from there for every row. `norms` trains norms and biases,
`adapters` masked low-rank adapters besides (as PERP, arXiv 2312.15230), on fresh windows of the calibration text, one a
step. Finished rows are read from the output file. Needs the extra `peft`.

    python benchmarks/retraining.py MODEL --calibration TEXT --texts TEXT1,TEXT2 --folder runs/pruned-2-4
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from shared import calibration_of, open_record, parse_arguments, save, texts_of
from torch import Tensor
from tqdm import trange
from transformers import PreTrainedModel, get_linear_schedule_with_warmup, set_seed

from optimum_fista import FistaPruner, FistaPruningConfig, mask_adapters, masked_training, merge_adapters, save_masked
from optimum_fista.run.checkpoints.loading import load_model
from optimum_fista.run.evaluation.perplexity import evaluate_perplexity
from optimum_fista.run.evaluation.verification import verify_checkpoint
from optimum_fista.run.reports.markdown import markdown_lines

RATES = {"norms": 2e-3, "adapters": 1e-3}


def train(model: torch.nn.Module, sequences: Tensor, rate: float) -> tuple[int, list[float]]:
    """AdamW, one sequence a step, a linear schedule; returns the number of weights trained, and the losses."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, len(sequences) // 10, len(sequences))
    losses = []
    model.train()
    for step in trange(len(sequences)):
        ids = sequences[step : step + 1]
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return sum(parameter.numel() for parameter in parameters), losses


def retrain(model: PreTrainedModel, folder: Path, kind: str, sequences: Tensor, rank: int) -> dict[str, Any]:
    """Train one kind of weights of the pruned model in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(kind == "norms" and parameter.ndim == 1)
    started = time.perf_counter()
    if kind == "adapters":
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        peft_model = mask_adapters(get_peft_model(model, adapters), folder)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad or parameter.ndim == 1)
        trained, losses = train(peft_model, sequences, RATES[kind])
        merge_adapters(peft_model)
    else:
        with masked_training(model, folder):
            trained, losses = train(model, sequences, RATES[kind])
    return {"rate": RATES[kind], "trained": trained, "seconds": time.perf_counter() - started, "losses": losses}


def measure(arguments: Namespace, kind: str, windows: Tensor, texts: dict[str, Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {"row": kind}
    set_seed(arguments.seed)
    source = arguments.model if kind == "dense" else str(arguments.folder)
    if kind != "dense" and not arguments.folder.exists():
        model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
        pruner = FistaPruner(FistaPruningConfig(pattern=arguments.pattern, method=arguments.method))
        report = pruner.prune(model, windows[: arguments.num_samples].split(4))
        pruner.save_pretrained(model, arguments.folder, tokenizer)
        row |= {"totals": report.totals, "seconds": report.seconds["total"], "config": report.config}
    model, tokenizer = load_model(source, dtype="float32", device="cpu")
    if kind not in ("dense", "pruned"):
        row |= retrain(model, arguments.folder, kind, windows[arguments.num_samples :], arguments.rank)
        retrained = arguments.folder.with_name(f"{arguments.folder.name}-{kind}")
        save_masked(model, retrained, arguments.folder, tokenizer, overwrite=True)
        row["num_zeros"] = verify_checkpoint(retrained).num_zeros
    row["perplexity"] = {
        name: evaluate_perplexity(model, text, progress=False).perplexity for name, text in texts.items()
    }
    return row


_HELP = {
    "folder": "where the pruned model is kept",
    "num_samples": "sequences to prune on",
    "steps": "sequences to train on",
}


def main() -> None:
    ways = {"rows": ["adapters", "norms"], "pattern": "2:4", "method": "obs_admm", "rank": 16}
    sizes = {"num_samples": 8, "steps": 100, "sequence_length": 512, "max_windows": 12, "test_length": 1024}
    others = {"threads": 1, "seed": 0, "output": Path("runs/retraining.json")}
    required = ("model", "calibration", "texts", "folder")
    arguments = parse_arguments(__doc__, *required, helps=_HELP, **ways, **sizes, **others)
    arguments.folder = Path(arguments.folder)
    torch.set_num_threads(arguments.threads)
    _, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
    windows = calibration_of(arguments, tokenizer, arguments.num_samples + arguments.steps)
    texts = texts_of(arguments, tokenizer, arguments.test_length)
    record = open_record(arguments, "rows", "folder")
    for kind in ("dense", "pruned", *arguments.rows):
        if kind not in {row["row"] for row in record["rows"]}:
            record["rows"].append(measure(arguments, kind, windows, texts))
            save(arguments, record)
    shown = []
    for row in record["rows"]:
        perplexities = (f"{row['perplexity'][name]:.2f}" for name in texts)
        shown.append((row["row"], f"{row.get('trained', 0):,}", *perplexities, f"{row.get('seconds', 0):.0f}"))
    print("\n".join(markdown_lines(("weights", "trained", *texts, "seconds"), shown)))


if __name__ == "__main__":
    main()
