"""Recovery: the kept weights of a pruned model, trained under the masks to predict as the dense model does."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import logging
import math
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import cached_file

from optimum_fista.environment import numerical_environment
from optimum_fista.folder.checkpoint import CONFIG_FILE, MASKS_FILE, mark_retrained, read_report
from optimum_fista.folder.loading import (
    load_model,
    load_tokenizer,
    read_config,
    read_model,
    require_tokenizer,
    usable_device,
)
from optimum_fista.folder.output import (
    FOLDER,
    MODEL,
    RUN_FILE,
    digest_of,
    folder_beside,
    install,
    locked_output,
    require_output,
    unfinished_folder,
)
from optimum_fista.folder.source_files import copy_source
from optimum_fista.folder.writing import write_checkpoint
from optimum_fista.memory import available_bytes
from optimum_fista.model.architecture import find_decoder_layers, find_operators
from optimum_fista.model.forward import compute_dtype_of
from optimum_fista.model.operator import LinearOperator
from optimum_fista.prune.fingerprint import shared_files
from optimum_fista.prune.journal import is_whole, join_run, read_record, write_record
from optimum_fista.prune.ranks import Ranks, joined_ranks, launched_processes
from optimum_fista.report import (
    WORDS_OF_TRAIN,
    PruningReport,
    RecoveryReport,
    library_versions,
    public_name,
)
from optimum_fista.text.calibration_tokens import calibration_tokens_by_name, usual_length
from optimum_fista.train.distillation import STATE_RECORD, DistillationTrainer, Watch
from optimum_fista.train.recovery_options import RecoveryOptions
from optimum_fista.train.trained_masks import find_masks, find_record, local, pruned_folder
from optimum_fista.train.training import MaskedTrainingCallback

logger = logging.getLogger(__name__)

_USUAL_LENGTH = 512
_USUAL_STEPS, _MOST_SEQUENCES = 256, 32  # of the default: as many steps, of as few sequences as that allows
_FORMAT = 3
_RATES = {"all": 2e-4, "lora": 1e-3, "norms": 2e-3}
_WIDTH_OF_RATE = 576
"""Hidden size of the model on which the rate of `"all"` was tuned; with Adam it goes down as the width goes up."""
_WARM_UP, _LEAST_WARM_UP = 0.05, 10  # a share of the steps, and steps
_EVALUATIONS, _RANK = 4, 16  # after the first; of adapters
_MARGIN = 0.9  # of the memory that is free


@numerical_environment()
def recover(
    folder: str | Path,
    teacher: str | Path | None = None,
    output_dir: str | Path | None = None,
    *,
    calibration: str = "self",
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> RecoveryReport:
    """Train what a pruned model kept, so that it predicts as the dense model does; its zeros stay zero.

    It minimizes how far the pruned model's predictions are from the dense model's and from the text (`divergence`), by
    `transformers.Trainer` with AdamW, a warm-up and a cosine, on text that is read once. Weights, gradients and moments
    are float32; products are bfloat16 on an accelerator and on a CPU with AMX or AVX512-BF16. Sequences that are never
    trained on measure the loss before, now and then, and at the end: the weights with the smallest loss are saved, or
    those of `folder` if none had a smaller one.

    After a crash or an interrupt the same call resumes after the last state, which is saved every two minutes, and ends
    with the same bits on the same machine. Until all is done, what is finished lies in `output_dir` + ".unfinished".

    Processes that were launched together (docs/ranks.md) and all make this call share the sequences.

    Args:
        folder: A folder or Hub id saved by optimum-fista, packed or not. It is only read.
        teacher: The dense model, a Hub id or a model folder; `None`: the report of `folder` names a Hub id.
        output_dir: Where to write the recovered model; `None`: `folder`'s name + "-recovered".
        calibration: The text: `"self"` (the teacher writes it) or a source of `run.texts.text.load_text`.
        device: Where to compute; `None`: the accelerator if there is one, otherwise the CPU.
        overwrite: Replace a model that `output_dir` already holds, and an unfinished run of other settings.
        progress: Whether to show a progress bar.
        **options: `tokens`, `sequence_length`, `train` and the other fields of `RecoveryOptions`.

    Returns:
        What it did; the report in the folder holds it too, under `recoveries`.

    Raises:
        ValueError: If an option is out of range, the text is too short, the teacher has another vocabulary, a folder
            that is read changes meanwhile, or an unfinished run in `output_dir` had other settings or processes.
        FileNotFoundError: If `folder` is no pruned model's.
        FileExistsError: If `output_dir` holds a model already and `overwrite` is False, or files of something else.
        ImportError: If `train` is `"lora"` and PEFT is missing.
        BlockingIOError: If another run writes to `output_dir`.
        RankError: If another process failed or is gone.
    """
    asked, source, processes = RecoveryOptions(**options), str(folder), launched_processes()
    report = read_report(pruned_folder(source))
    name = str(teacher or report.model["name"])
    if teacher is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        why = f"the report of {source!r} calls the dense model {name!r}, which is no Hub id"
        raise ValueError(f"teacher is missing: {why}: pass the folder or Hub id of it (--teacher MODEL).")
    output = folder_beside(source, "-recovered") if output_dir is None else Path(output_dir)
    if asked.train == "lora" and processes > 1:
        raise ValueError("train='lora': several processes train no adapters: pass all or norms, or start one process.")
    if asked.train == "lora":
        _lora()  # says what to install if PEFT is missing
    if asked.report_to not in (trackers := ("none", *INTEGRATION_TO_CALLBACK)):
        raise ValueError(f"report_to={asked.report_to!r}: pass {', '.join(trackers)}.")
    for read in (source, name):
        require_output(output, overwrite, source=read)
    config = read_config(source)
    _require_same_vocabulary(source, config, name)
    reads_text = source if calibration != "self" and load_tokenizer(source) is not None else name
    require_tokenizer(reads_text)
    length, batch_size = asked.sequence_length or min(_USUAL_LENGTH, usual_length(config)), asked.batch_size
    if (accumulate := asked.accumulate) is None:
        accumulate = max(1, min(_MOST_SEQUENCES, asked.tokens // (_USUAL_STEPS * length)) // batch_size)
        accumulate = processes * math.ceil(accumulate / processes)
    if accumulate % processes:
        raise ValueError(
            f"accumulate={accumulate}: {processes} processes share the passes of a step: pass a multiple of "
            f"{processes} (--accumulate)."
        )
    tokens_of_step = length * batch_size * accumulate
    steps = asked.tokens // tokens_of_step
    if not steps:
        raise ValueError(
            f"tokens={asked.tokens}: one step takes {accumulate} passes of {batch_size} sequences of {length} tokens: "
            f"pass at least {tokens_of_step} (--tokens), or shorter sequences (--sequence-length)."
        )
    unfinished, count, held_out = unfinished_folder(output), steps * batch_size * accumulate, asked.held_out
    names = ("batch_size", "label_share", "seed", "train", "learning_rate")
    settings = {name: getattr(asked, name) for name in names} | {"accumulate": accumulate}
    with joined_ranks(device) as ranks, ExitStack() as opened:
        is_of_teacher = reads_text == name
        source, teacher = folders = ranks.each(lambda: _folders(source, name))
        reads_text = teacher if is_of_teacher else source
        place = usable_device(ranks.device)
        compute = compute_dtype_of(asked.compute_dtype, place)
        settings["compute_dtype"] = str(compute).removeprefix("torch.")

        def lock() -> None:
            opened.enter_context(locked_output(output))
            require_output(output, overwrite)  # another run may just have ended

        def draw() -> Tensor:
            places: dict[str, Any] = {"device": str(place), "keep_in": unfinished / FOLDER, "progress": progress}
            numbers = count + held_out, length, asked.seed
            try:
                return calibration_tokens_by_name(reads_text, calibration, *numbers, **places)
            except ValueError as error:
                text = f"tokens={asked.tokens} and held_out={held_out} ask for this text"
                raise ValueError(f"{text}: {error}") from error

        def finish() -> RecoveryReport:
            assert model is not None  # in rank 0
            for files in read_files:  # that of the source was read again for what is saved
                files.require_unchanged()
            record, masks = find_record(model, source)
            record = dataclasses.replace(record, recoveries=[*record.recoveries, found])
            shutil.rmtree(unfinished / MODEL, ignore_errors=True)  # of an earlier start
            (unfinished / MODEL).mkdir()
            copy_source(Path(source), unfinished / MODEL)
            write_checkpoint(model, unfinished / MODEL, record, masks, None)
            install(unfinished, output, overwrite, Path(source))
            return found

        ranks.first(lock)
        read_files = [shared_files(Path(folder), {}, ranks, progress) for folder in folders]
        windows, versions, masks_file = ranks.first(draw), library_versions(), Path(source) / MASKS_FILE
        fingerprint: dict[str, Any] = {
            "recovery": _FORMAT,
            "processes": ranks.count,  # sums are rounded otherwise with others
            "weights": read_files[0].digests,
            "masks": digest_of(masks_file) if masks_file.exists() else None,  # a packed folder has none
            "teacher": read_files[1].digests,
            "shape": [count, held_out, length],
            "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            "options": settings,
            "device": place.type,
            "versions": {name: versions[name] for name in ("optimum-fista", "torch", "transformers")},
        }
        join_run(unfinished, fingerprint, overwrite, ranks)
        ranks.first(lambda: write_record(unfinished / RUN_FILE, fingerprint))  # the folder is kept until the run ends
        texts, journal = (windows[:count], windows[count:]), unfinished / FOLDER
        run = _Run(source, teacher, *texts, settings, place, compute, journal, ranks)
        with _trainers_settings(place, output), ranks.exchanging():
            model, found = run.train(report, public_name(name), public_name(calibration), asked.report_to, progress)
        return ranks.first(finish)


def _folders(source: str, teacher: str) -> tuple[str, str]:
    """The folders that are read: of a Hub id the one of its commit of now, once all that is read of it is there."""
    if not Path(source).is_dir():
        source = snapshot_download(source)
    if not Path(teacher).is_dir():
        read_model(teacher, device_map="meta")
        teacher = str(Path(str(cached_file(teacher, CONFIG_FILE))).parent)
    return source, teacher


def steps_kept(output: Path) -> int:
    """Steps of an interrupted run into `output` that its next start resumes after."""
    return max(_kept_states(unfinished_folder(output) / FOLDER), default=0)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The training, in each of the processes."""

    source: str
    teacher: str
    windows: Tensor
    held_out: Tensor
    options: dict[str, Any]
    place: torch.device
    compute: torch.dtype
    journal: Path
    ranks: Ranks

    def train(
        self, report: PruningReport, teacher_name: str, calibration: str, report_to: str, progress: bool
    ) -> tuple[PreTrainedModel | None, RecoveryReport]:
        """Train, or resume; the model to save, which rank 0 has, and what was done."""
        model = self.ranks.each(self._load)
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        model.float()
        free = self.ranks.gather(available_bytes(self.place))
        kind, checkpointed = self.ranks.first(lambda: self._choose(model, report, free))
        num_trained = _mark_trained(model, kind, self.source, self.options["seed"])
        num_trained -= report.totals["num_zeros"] if kind == "all" else 0
        teacher, _ = self.ranks.each(lambda: load_model(self.teacher, device=str(self.place), dtype=self.compute))
        kept = self.ranks.first(lambda: _kept_states(self.journal, checked=True))
        arguments = self._arguments(model, kind, checkpointed, report_to, progress, resumed=bool(kept))
        masked = [MaskedTrainingCallback(self.source)] if kind == "all" else []
        teacher, share = teacher.eval().requires_grad_(False), self.options["label_share"]
        trainer = DistillationTrainer(
            model, teacher, share, arguments, self.windows, self.held_out, [Watch(self.ranks), *masked]
        )
        try:
            trainer.train(str(kept[max(kept)]) if kept else None)
        finally:
            for callback in masked:  # after an error too: it has a hook on all optimizers
                callback.on_train_end()
        state, trained = trainer.state, cast(nn.Module, trainer.model)
        measured = [row for row in state.log_history if "eval_loss" in row]
        evaluations = [[row["step"], row["seconds"], row["eval_loss"]] for row in measured]
        steps, seconds, before = state.global_step, state.log_history[-1]["seconds"], evaluations[0][2]
        best_step, loss = state.best_global_step or 0, before
        if best_step:
            if kind == "lora":
                _lora().merge_adapters(model)
            for name, parameter in trained.named_parameters():
                part = local(parameter.data)
                part.copy_(part.to(dtypes.get(name.replace(".base_layer.", "."), part.dtype)))
            loss = trainer.evaluate()["eval_loss"]  # of what is saved, which has to be better
        if not loss < before:
            best_step, loss = 0, before
        found = RecoveryReport(
            teacher=teacher_name,
            train=kind,
            num_trained=num_trained,
            num_tokens=self.windows.numel() // state.max_steps * steps,
            calibration={
                "source": calibration,
                "sha256": hashlib.sha256(torch.cat((self.windows, self.held_out)).numpy().tobytes()).hexdigest(),
                "sequence_length": self.windows.shape[1],
                "held_out": len(self.held_out),
            },
            options=self.options | {"learning_rate": arguments.learning_rate},
            evaluations=evaluations,
            best_step=best_step,
            held_out_loss_before=before,
            held_out_loss=loss,
            seconds=seconds,
        )
        return self._recovered(trained if best_step else None), found

    def _load(self) -> PreTrainedModel:
        """The pruned model, without what is random in training."""
        if not self.journal.exists():
            begun = f"rank 0 began {str(self.journal.parent)!r}, and it isn't here"
            raise ValueError(f"output: {begun}: pass a folder that all nodes share.")
        config = read_config(self.source)
        for part in (config, config.get_text_config(decoder=True)):
            for name, value in vars(part).items():
                if isinstance(value, float) and ("drop" in name or "jitter" in name):
                    setattr(part, name, 0.0)
        return read_model(self.source, dtype="auto", config=config)

    def _choose(self, model: PreTrainedModel, report: PruningReport, free: list[int | None]) -> tuple[str, bool]:
        """What is trained, and whether activations are computed twice: the first that there is memory for."""
        noted = read_record(self.journal / "choice.json")  # of an earlier start
        if noted is not None:
            return noted["train"], noted["checkpointed"]
        size, operators = model.num_parameters(), _linear_operators(model)
        small = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
        trained = {"all": size, "lora": small + sum(_RANK * sum(o.shape) for o in operators), "norms": small}
        asked = self.options["train"]
        kinds = [asked] if asked != "auto" else [kind for kind in trained if kind != "lora" or self.ranks.count == 1]
        known = [found for found in free if found is not None]
        shared = int(os.environ.get("LOCAL_WORLD_SIZE", len(free))) if self.place.type == "cpu" else 1
        ways = (False, True) if model.supports_gradient_checkpointing else (False,)
        for kind, twice in itertools.product(kinds, ways):
            # Gradient and two moments; masks; the teacher; inputs and outputs of operators, and logits.
            needed = 12 * trained[kind] + (size if kind != "norms" else 0)
            needed += (report.model.get("dense_num_parameters") or size) * self.compute.itemsize
            config, layers = model.config.get_text_config(decoder=True), len(find_decoder_layers(model))
            inside = 8 * sum(sum(operator.shape) for operator in operators)
            inside = inside // layers + 4 * layers * config.hidden_size if twice else inside
            needed += self.options["batch_size"] * self.windows.shape[1] * (inside + 10 * config.vocab_size)
            if not known or needed <= _MARGIN * min(known) / shared:
                break
        more = ", with activations that are computed twice" if twice else ""
        logger.info("%s are trained: %s takes %.1f GB%s", WORDS_OF_TRAIN[kind], kind, needed / 1e9, more)
        write_record(self.journal / "choice.json", {"train": kind, "checkpointed": twice})
        return kind, twice

    def _arguments(
        self, model: PreTrainedModel, kind: str, checkpointed: bool, report_to: str, progress: bool, *, resumed: bool
    ) -> TrainingArguments:
        sequences = self.options["batch_size"] * self.options["accumulate"]
        steps, rate = len(self.windows) // sequences, self.options["learning_rate"]
        width, every = model.config.get_text_config(decoder=True).hidden_size, math.ceil(steps / _EVALUATIONS)
        arguments = TrainingArguments(
            str(self.journal.resolve()),
            per_device_train_batch_size=self.options["batch_size"],
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=self.options["accumulate"] // self.ranks.count,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            learning_rate=rate or _RATES[kind] * (min(1.0, _WIDTH_OF_RATE / width) if kind == "all" else 1.0),
            lr_scheduler_type="cosine_warmup_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.0},
            warmup_steps=min(steps, max(_LEAST_WARM_UP, round(_WARM_UP * steps))),
            optim="adamw_torch_fused",
            adam_beta2=0.95,
            bf16=self.compute == torch.bfloat16,
            activation_checkpointing=checkpointed,
            eval_strategy="steps",
            eval_steps=every,
            eval_on_start=not resumed,
            metric_for_best_model="eval_loss",
            load_best_model_at_end=True,
            save_strategy="best",
            logging_steps=every if report_to == "none" else 1,
            logging_nan_inf_filter=False,
            report_to=report_to,
            disable_tqdm=not progress,
            dataloader_pin_memory=False,
            use_cpu=self.place.type == "cpu",
        )
        arguments._setup_devices, arguments._n_gpu = self.place, 1  # the first accelerator or all of them otherwise
        return arguments

    def _recovered(self, trained: nn.Module | None) -> PreTrainedModel | None:
        """In rank 0 the model of the source in its own dtypes, with the trained weights if these are better."""
        model = None if self.ranks.index else read_model(self.source, dtype="auto")
        for name, parameter in trained.named_parameters() if trained is not None else ():
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if model is not None and "lora_" not in name:
                model.get_parameter(name.replace(".base_layer.", ".")).data.copy_(value.detach())
        if model is not None and trained is not None:
            mark_retrained(model)
        return model


def _linear_operators(model: PreTrainedModel) -> list[LinearOperator]:
    """The linear operators of the decoder layers, fused experts aside."""
    return [o for name, layer in find_decoder_layers(model) for o in find_operators(name, layer, ["*"]).values()]


def _lora() -> Any:  # needs PEFT
    return importlib.import_module("optimum_fista.train.lora")


def _mark_trained(model: PreTrainedModel, kind: str, source: str, seed: int) -> int:
    """Have gradients for what is trained, outside of embeddings and head; how many weights that are."""
    head, parameters = model.get_output_embeddings(), dict(model.named_parameters())
    outer = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding) or module is head}
    model.requires_grad_(False)
    if kind == "lora":
        torch.manual_seed(seed)
        # PEFT's "all-linear" takes fused experts too.
        names, masks = [operator.name for operator in _linear_operators(model)], find_masks(model, source)
        _lora().add_adapters(model, names, masks, _RANK)
    for name, parameter in parameters.items():
        if name.rpartition(".")[0] not in outer and (kind == "all" or parameter.ndim == 1):
            parameter.requires_grad_()
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def _trainers_settings(place: torch.device, output: Path) -> Iterator[None]:
    """What the Trainer and Accelerate change in the process is put back: states, random numbers, the environment."""
    kinds, environment = (AcceleratorState, GradientState, PartialState), dict(os.environ)
    states = [dict(kind._shared_state) for kind in kinds]
    drawn = random.getstate(), np.random.get_state()
    devices = range(torch.accelerator.device_count()) if place.type != "cpu" else ()
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{output}-logs")
    if place.type != "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(place)
    try:
        with torch.random.fork_rng(devices=devices, device_type=place.type):
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        os.environ.clear()
        os.environ.update(environment)
        for kind, state in zip(kinds, states, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)


def _kept_states(journal: Path, *, checked: bool = False) -> dict[int, Path]:
    """States that an unfinished recovery can resume from, by the steps done then; `checked`: whole ones, others go."""
    found, best = {}, {}
    for folder in journal.glob("checkpoint-*"):
        record = read_record(folder / STATE_RECORD)
        if record is not None and all(not checked or is_whole(folder / name, d) for name, d in record["files"].items()):
            step = int(folder.name.rpartition("-")[2])
            found[step], best[step] = folder.resolve(), record["best"]
    found = {step: folder for step, folder in found.items() if not best[step] or best[step] in found}
    for folder in journal.glob("checkpoint-*") if checked else ():
        if folder.resolve() not in found.values():
            shutil.rmtree(folder)
    return found


def _require_same_vocabulary(source: str, config: PreTrainedConfig, teacher: str) -> None:
    """Refuse a teacher whose predictions are of other tokens."""
    theirs = read_config(teacher)
    sizes = [c.get_text_config(decoder=True).vocab_size for c in (config, theirs)]
    tokenizers = [load_tokenizer(source), load_tokenizer(teacher)]
    known = [t.get_vocab() for t in tokenizers if isinstance(t, PreTrainedTokenizerBase)]
    if sizes[0] != sizes[1] or (len(known) == 2 and known[0] != known[1]):
        other = f"has another vocabulary ({sizes[1]:,} tokens) than {source!r} ({sizes[0]:,})"
        raise ValueError(f"teacher={teacher!r} {other}: pass the dense model that this one was pruned from.")
