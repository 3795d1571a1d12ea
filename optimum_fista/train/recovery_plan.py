"""Plan a recovery: check its options, choose which weights to train, and estimate memory and time.

The plan is made before anything large is read, from configurations and a model without weights. `recover` trains by it;
`preview` prints it, and measures the time of one step. Nothing here writes a file of the run.
"""

import itertools
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import cached_file

from optimum_fista.environment import numerical_environment
from optimum_fista.folder.checkpoint import CONFIG_FILE, VOCABULARY_FILE, kept_tokens, read_report
from optimum_fista.folder.output import folder_beside, require_output
from optimum_fista.memory import available_bytes, size_text
from optimum_fista.model.choice import find_operators
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.precision import is_fast
from optimum_fista.report import WORDS_OF_TRAIN, PruningReport
from optimum_fista.source.loading import (
    load_model,
    load_tokenizer,
    model_class,
    read_config,
    read_model,
    require_tokenizer,
    usable_device,
)
from optimum_fista.text.calibration_tokens import usual_length
from optimum_fista.text.sources import require_source
from optimum_fista.train.divergence import LOGITS_PER_CHUNK, Predictor, divergence
from optimum_fista.train.recovery_options import RecoveryOptions
from optimum_fista.train.training import pruned_folder

_USUAL_LENGTH = 512  # tokens
_USUAL_STEPS, _MOST_SEQUENCES = (
    256,
    32,
)  # defaults: the number of steps, and the most sequences in a step
_MARGIN = 0.9  # of the memory that is free: the rest is for what is not counted


@dataclass(frozen=True)
class RecoveryPlan:
    """Names and numbers of a recovery: its models, its text, its output, its steps."""

    source: str  # folder of the pruned model
    teacher: str  # folder of the dense model
    teacher_name: str  # as the user gave it
    calibration: str
    text_model: str  # whose tokenizer reads the text, or who writes it
    output: Path
    options: RecoveryOptions
    length: int  # tokens in a sequence
    accumulate: int  # passes for a step, of all processes together
    steps: int
    place: torch.device
    compute: torch.dtype  # of products
    report: PruningReport  # of the pruned model
    kept: (
        Tensor | None
    )  # the teacher's token for each of the student's, if the vocabulary was pruned

    @property
    def num_sequences(self) -> int:
        """Sequences that are trained on, each once."""
        return self.steps * self.accumulate * self.options.batch_size


@dataclass(frozen=True)
class Choice:
    """The kind of training, and the memory that it takes."""

    train: str  # "all" or "norms"
    checkpointed: bool  # whether decoder layers compute their activations twice
    num_trained: int  # weights, zeros aside
    num_bytes: (
        int  # of both models, gradients, moments and activations, on the device of one process
    )

    def __str__(self) -> str:
        """A line for people."""
        twice = ", with activations that are computed twice" if self.checkpointed else ""
        what = f"{self.num_trained:,} parameters are trained ({WORDS_OF_TRAIN[self.train]})"
        return f"{what}, which takes about {size_text(self.num_bytes)} of memory{twice}"


def plan_recovery(
    folder: str | Path,
    teacher: str | Path | None,
    output_dir: str | Path | None,
    *,
    calibration: str,
    device: str | None,
    overwrite: bool,
    processes: int,
    **options: Any,
) -> RecoveryPlan:
    """Check all that can be checked without weights and text; models of the Hub come into its cache last."""
    asked, source = RecoveryOptions(**options), str(folder)
    report = read_report(pruned_folder(source))
    name = str(teacher or report.first_model.name)
    if teacher is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        why = f"the report of {source!r} calls the dense model {name!r}, which is no Hub id"
        raise ValueError(
            f"teacher is missing: {why}: pass the folder or Hub id of it (--teacher MODEL)."
        )
    output = folder_beside(source, "-recovered") if output_dir is None else Path(output_dir)
    for read in (source, name):
        require_output(output, overwrite, source=read)
    if calibration != "self":
        require_source(calibration)
    config, tokenizers = read_config(source), [load_tokenizer(source), load_tokenizer(name)]
    sizes = [
        found.get_text_config(decoder=True).vocab_size for found in (config, read_config(name))
    ]
    known = [tokenizer.get_vocab() for tokenizer in tokenizers if tokenizer is not None]
    kept = _kept_of(source, name, sizes) if sizes[0] < sizes[1] else None
    if (
        kept is not None and len(known) == 2
    ):  # the ids that the teacher has for the student's tokens
        known[0] = {
            token: int(kept[number]) for token, number in known[0].items() if number < len(kept)
        }
        known[1] = {token: number for token, number in known[1].items() if token in known[0]}
    if (kept is None and sizes[0] != sizes[1]) or (len(known) == 2 and known[0] != known[1]):
        other = f"has another vocabulary ({sizes[1]:,} tokens) than {source!r} ({sizes[0]:,})"
        raise ValueError(
            f"teacher={name!r} {other}: pass the dense model that this one was pruned from."
        )
    if kept is not None and calibration == "self":
        raise ValueError(
            f"calibration='self': the teacher would write tokens that {source!r} lacks: pass a text."
        )
    text_model = source if calibration != "self" and tokenizers[0] is not None else name
    require_tokenizer(text_model)
    length = asked.sequence_length or min(_USUAL_LENGTH, usual_length(config))
    batch_size, accumulate = asked.batch_size, asked.accumulate
    if accumulate is None:
        accumulate = max(
            1, min(_MOST_SEQUENCES, asked.tokens // (_USUAL_STEPS * length)) // batch_size
        )
        accumulate = processes * math.ceil(accumulate / processes)
    if accumulate % processes:
        share = f"{processes} processes share the passes of a step"
        raise ValueError(
            f"accumulate={accumulate}: {share}: pass a multiple of {processes} (--accumulate)."
        )
    tokens_of_step = length * batch_size * accumulate
    if asked.tokens < tokens_of_step:
        raise ValueError(
            f"tokens={asked.tokens}: one step takes {accumulate} passes of {batch_size} sequences of {length} tokens: "
            f"pass at least {tokens_of_step} (--tokens), or shorter sequences (--sequence-length)."
        )
    place = usable_device(device)
    is_quick = asked.compute_dtype == "auto" and is_fast(torch.bfloat16, place)
    compute = torch.bfloat16 if asked.compute_dtype == "bfloat16" or is_quick else torch.float32
    if not Path(source).is_dir():
        source = snapshot_download(source)  # masks and report too
    folder_of_teacher = name
    if not Path(name).is_dir():
        read_model(name, device_map="meta")  # into the cache, only the files that are needed
        folder_of_teacher = str(
            Path(str(cached_file(name, CONFIG_FILE))).parent
        )  # of the commit that main is at now
    text_model = folder_of_teacher if text_model == name else source
    names = source, folder_of_teacher, name, calibration, text_model
    steps = asked.tokens // tokens_of_step
    return RecoveryPlan(
        *names, output, asked, length, accumulate, steps, place, compute, report, kept
    )


def _kept_of(source: str, teacher: str, sizes: Sequence[int]) -> Tensor | None:
    """The teacher's id of each token of a student with fewer tokens; `None` if they do not fit together."""
    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    files = (cached_file(name, VOCABULARY_FILE, **quiet) for name in (source, teacher))
    folder, before = (None if file is None else Path(file).parents[1] for file in files)
    kept = None if folder is None else kept_tokens(folder, before)
    return (
        kept if kept is not None and len(kept) == sizes[0] and int(kept.max()) < sizes[1] else None
    )


def choose(plan: RecoveryPlan, free: Sequence[int | None]) -> Choice:
    """Choose the first kind of training that fits into memory; activations are computed twice only if needed.

    `free` are the bytes that each process has; if nothing fits, the last kind is chosen.
    """
    with torch.device("meta"):  # no memory for weights
        model = model_class(config := read_config(plan.source)).from_config(config)
    size, config = model.num_parameters(), model.config.get_text_config(decoder=True)
    layers = find_decoder_layers(model)
    operators = [
        operator
        for name, layer in layers
        for operator in find_operators(name, layer, ["*"]).values()
    ]
    inner = _inner_parameters(model)
    small = sum(parameter.numel() for parameter in inner if parameter.ndim == 1)
    trained = {"all": sum(parameter.numel() for parameter in inner), "norms": small}
    kinds = [kind for kind in trained if plan.options.train in (kind, "auto")]
    known = [found for found in free if found is not None]
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", len(free))) if plan.place.type == "cpu" else 1
    for kind, twice in itertools.product(
        kinds, (False, True) if model.supports_gradient_checkpointing else (False,)
    ):
        needed = 4 * size + 12 * trained[kind]  # float32: weights; a gradient and two moments
        needed += size if kind == "all" else 0  # masks, a byte a weight
        needed += (
            plan.report.first_model.num_parameters or size
        ) * plan.compute.itemsize  # the teacher
        inside = 8 * sum(
            sum(operator.shape) for operator in operators
        )  # inputs and outputs of operators, a token
        if twice:  # those of one layer at a time, and what enters each layer
            inside = inside // len(layers) + 4 * len(layers) * config.hidden_size
        tokens = plan.options.batch_size * plan.length
        needed += tokens * (
            inside + 12 * config.hidden_size
        )  # and what enters both heads, with its gradient
        needed += 20 * min(
            LOGITS_PER_CHUNK, tokens * config.vocab_size
        )  # of both, in two dtypes, with their gradient
        if not known or needed <= _MARGIN * min(known) / shared:
            break
    zeros = plan.report.totals["num_zeros"] if kind == "all" else 0
    return Choice(kind, twice, trained[kind] - zeros, needed)


def load_student(source: str) -> PreTrainedModel:
    """Load the pruned model, without random parts such as dropout."""
    config = read_config(source)
    for part in (config, config.get_text_config(decoder=True)):
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(part, name, 0.0)
    return read_model(source, dtype="auto", config=config)


def mark_trained(model: PreTrainedModel, train: str) -> None:
    """Turn on gradients for the parameters to train; embeddings and head are never trained."""
    model.requires_grad_(False)
    for parameter in _inner_parameters(model):
        parameter.requires_grad_(train == "all" or parameter.ndim == 1)


def _inner_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Parameters but those of embeddings and head, which are large and are never pruned."""
    head = model.get_output_embeddings()
    outer = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module is head
    }
    return [p for name, p in model.named_parameters() if name.rpartition(".")[0] not in outer]


@numerical_environment()
def preview(plan: RecoveryPlan) -> str:
    """Say in a few lines what a recovery will do and need; one step is timed if it fits into memory."""
    options, free = plan.options, available_bytes(plan.place)
    choice = choose(plan, [free])
    passes = f"{plan.accumulate} x {options.batch_size} sequences of {plan.length} tokens"
    lines = {
        "pruned": f"{plan.source}, {plan.report.model['num_parameters']:,} parameters",
        "teacher": plan.teacher_name
        + ("" if plan.kept is None else f", its predictions of {len(plan.kept):,} tokens"),
        "trained": str(choice),
        "text": f"{plan.num_sequences * plan.length:,} tokens of {plan.calibration}, {plan.steps} steps of {passes}; "
        f"{options.held_out} more sequences are held out",
        "memory": f"{size_text(choice.num_bytes)} on {plan.place}"
        + (f", {size_text(free)} are free" if free else ""),
        "time": "not measured: one step does not fit into the free memory",
        "output": str(plan.output),
    }
    if free is None or choice.num_bytes <= free:
        seconds = _seconds_of_step(plan, choice)
        lines["time"] = (
            f"about {tqdm.format_interval(plan.steps * seconds)}, {seconds:.1f} seconds a step"
        )
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def _seconds_of_step(plan: RecoveryPlan, choice: Choice) -> float:
    """Time the forward and backward passes of one step, on any tokens."""
    student = load_student(plan.source).float()
    mark_trained(student, choice.train)
    student.to(plan.place)
    if choice.checkpointed:
        student.gradient_checkpointing_enable()
    teacher, _ = load_model(plan.teacher, device=str(plan.place), dtype=plan.compute)
    both = Predictor(student.train()), Predictor(teacher.eval(), plan.kept)
    vocabulary = student.get_input_embeddings().num_embeddings
    ids = (
        torch.arange(plan.options.batch_size * plan.length)
        .remainder(vocabulary)
        .view(-1, plan.length)
        .to(plan.place)
    )
    seconds = 0.0
    for _ in range(2):  # the first pass also fills caches
        started = time.perf_counter()
        with torch.autocast(plan.place.type, plan.compute, enabled=plan.compute != torch.float32):
            divergence(*both, ids, plan.options.label_share).backward()
        torch.get_device_module(plan.place).synchronize()
        seconds = time.perf_counter() - started
    return plan.accumulate * seconds
