"""Recovery: the kept weights of a pruned model, trained under the masks to predict as the dense model does."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from optimum_fista.model.products import COMPUTE_DTYPES, compute_dtype_of
from optimum_fista.run.checkpoints.checkpoint import read_report
from optimum_fista.run.checkpoints.installation import discard, empty, install
from optimum_fista.run.checkpoints.loading import load_tokenizer, read_config, usable_device
from optimum_fista.run.checkpoints.output_folder import (
    FOLDER,
    MODEL_FILES,
    folder_beside,
    require_output,
    unfinished_folder,
)
from optimum_fista.run.checkpoints.output_lock import locked_output
from optimum_fista.run.checkpoints.writing import write_checkpoint
from optimum_fista.run.environment import numerical_environment
from optimum_fista.run.options import require_seed
from optimum_fista.run.ranks import joined_ranks, launched_processes
from optimum_fista.run.reports.report import WORDS_OF_TRAIN, PruningReport, RecoveryReport, library_versions
from optimum_fista.run.retraining.distillation import require_cache
from optimum_fista.run.retraining.masks import find_record, pruned_folder
from optimum_fista.run.retraining.recovery_training import TEACHER_FOLDER, RecoveryTraining, open_state, state_files
from optimum_fista.run.streamed.fingerprint import SourceFiles, is_of_another_run
from optimum_fista.run.streamed.journal import Journal, read_record, refuse_differences
from optimum_fista.run.texts.calibration_source import calibration_tokens_by_name, usual_length

_USUAL_LENGTH = 512
_USUAL_STEPS, _MOST_SEQUENCES = 256, 32  # of the default: as many steps, of as few sequences as that allows
_FORMAT = 1


@numerical_environment()
def recover(
    folder: str | Path,
    teacher: str | Path | None = None,
    output_dir: str | Path | None = None,
    *,
    calibration: str = "self",
    tokens: int = 262_144,
    sequence_length: int | None = None,
    batch_size: int = 2,
    accumulate: int | None = None,
    held_out: int = 8,
    train: str = "auto",
    learning_rate: float | None = None,
    label_share: float = 0.5,
    seed: int = 0,
    device: str | None = None,
    compute_dtype: str = "auto",
    teacher_cache: str | Path | None = None,
    top_k: int = 64,
    overwrite: bool = False,
    progress: bool = True,
) -> RecoveryReport:
    """Train what a pruned model kept, so that it predicts as the dense model does; its zeros stay zero.

    It minimizes how far the pruned model's predictions are from the dense model's and from the text (`divergence`), by
    AdamW with a warm-up and a cosine, on text that is read once. Weights, gradients and moments are float32; products
    are bfloat16 on an accelerator and on a CPU with AMX or AVX512-BF16. Sequences that are never trained on measure the
    loss before, now and then, and at the end: the weights with the smallest loss are saved, or those of `folder` if
    none had a smaller one.

    After a crash or an interrupt the same call resumes and ends with the same bits; if the processor or the number of
    threads is another, a warning says so. Until all is done, what is finished lies in `output_dir` + ".unfinished".

    Processes that were launched together (docs/ranks.md) and all make this call share the weights and the sequences.

    Args:
        folder: A folder or Hub id saved by optimum-fista, packed or not. It is only read.
        teacher: The dense model, a Hub id or a model folder; `None`: the report of `folder` names a Hub id.
        output_dir: Where to write the recovered model; `None`: `folder`'s name + "-recovered".
        calibration: The text: `"self"` (the teacher writes it) or a source of `run.texts.text.load_text`.
        tokens: Tokens to train on.
        sequence_length: Tokens a sequence; `None`: 512, or the model's maximum if that is shorter.
        batch_size: Sequences a forward and backward pass.
        accumulate: Passes a step, of all processes together; `None`: such that there are about 256 steps, of at most 32
            sequences.
        held_out: Further sequences, to measure the loss on.
        train: `"all"` kept weights but embeddings and head, `"lora"` (in one process), `"norms"`, or `"auto"`, the
            first of them for which there is enough memory.
        learning_rate: The largest learning rate; `None`: one that fits `train` and the width of the model.
        label_share: How much of the loss is the cross-entropy of the text itself, in [0, 1].
        seed: Decides which text is drawn, and its order.
        device: Where to compute; `None`: the accelerator if there is one, otherwise the CPU.
        compute_dtype: `"float32"`, `"bfloat16"`, or `"auto"`.
        teacher_cache: A folder to keep the teacher's largest logits in, so that it need not be in memory during the
            training; `None`: this is done, with the run's own files, only if both models don't fit.
        top_k: Logits a position that are kept then.
        overwrite: Replace a model that `output_dir` already holds, and an unfinished run of other settings.
        progress: Whether to show a progress bar.

    Returns:
        What it did; the report in the folder holds it too, under `recoveries`.

    Raises:
        ValueError: If an option is out of range, the text is too short, the teacher has another vocabulary, the
            weights or the configuration in `folder` change meanwhile, an unfinished run in `output_dir` had other
            settings or another number of processes, or the processes can't share the passes of a step.
        FileNotFoundError: If `folder` is no pruned model's.
        FileExistsError: If `output_dir` holds a model already and `overwrite` is False, or it or `teacher_cache` holds
            files of something else.
        ImportError: If `train` is `"lora"` and PEFT is missing.
        BlockingIOError: If another run writes to `output_dir`, or fills `teacher_cache`.
        RankError: If another process failed or is gone.
    """
    source, processes = str(folder), launched_processes()
    report = read_report(pruned_folder(source))
    teacher = _teacher_of(report, source) if teacher is None else str(teacher)
    output = folder_beside(source, "-recovered") if output_dir is None else Path(output_dir)
    _require_options(locals())
    for read in (source, teacher):
        require_output(output, overwrite, source=read, names=MODEL_FILES)
    config = read_config(source)
    _require_same_vocabulary(source, config, teacher)
    tokenizer = load_tokenizer(source)
    reads_text = source if calibration != "self" and tokenizer is not None else teacher
    if reads_text == teacher and load_tokenizer(teacher) is None:
        raise ValueError(
            f"teacher={teacher!r} has no tokenizer, which the text needs: copy the model's into the folder."
        )
    length = min(_USUAL_LENGTH, usual_length(config)) if sequence_length is None else sequence_length
    if accumulate is None:
        accumulate = max(1, min(_MOST_SEQUENCES, tokens // (_USUAL_STEPS * length)) // batch_size)
        accumulate = processes * math.ceil(accumulate / processes)
    if accumulate % processes:
        raise ValueError(
            f"accumulate={accumulate}: {processes} processes share the passes of a step: pass a multiple of "
            f"{processes} (--accumulate)."
        )
    steps = tokens // (length * batch_size * accumulate)
    if not steps:
        raise ValueError(
            f"tokens={tokens}: one step takes {accumulate} passes of {batch_size} sequences of {length} tokens: pass "
            f"at least {length * batch_size * accumulate} (--tokens), or shorter sequences (--sequence-length)."
        )
    unfinished = unfinished_folder(output)
    with joined_ranks(device) as ranks, ExitStack() as opened:
        place = usable_device(ranks.device)
        compute = compute_dtype_of(compute_dtype, place)
        count = steps * batch_size * accumulate
        options: dict[str, Any] = {"batch_size": batch_size, "accumulate": accumulate, "label_share": label_share}
        options |= {"seed": seed, "compute_dtype": str(compute).removeprefix("torch."), "top_k": top_k, "train": train}
        options |= {"learning_rate": learning_rate, "teacher_cache": teacher_cache is not None}
        files: SourceFiles | None = None

        def begin() -> tuple[Tensor, dict[str, Any]]:
            """The text, and what the teacher's predictions depend on."""
            nonlocal files
            opened.enter_context(locked_output(output))
            require_output(output, overwrite, names=MODEL_FILES)  # another run may just have ended
            files, theirs = (_files(name, progress) for name in (source, teacher))
            of_teacher: dict[str, Any] = {"teacher": teacher if theirs is None else theirs.digests}
            of_teacher["compute_dtype"] = options["compute_dtype"]
            versions = library_versions()
            fingerprint: dict[str, Any] = of_teacher | {
                "recovery": _FORMAT,
                "processes": ranks.count,  # sums are rounded otherwise with others
                "weights": source if files is None else files.digests,
                "shape": [count, held_out, length],
                "options": options,
                "device": place.type,
                "versions": {name: versions[name] for name in ("optimum-fista", "torch", "transformers")},
            }
            begun = read_record(unfinished / FOLDER / "fingerprint.json") or {}
            kept = any(any((unfinished / FOLDER).glob(name)) for name in ("state*.safetensors", TEACHER_FOLDER))
            nothing_kept = "recovery" in begun and not kept
            if begun and not overwrite and not nothing_kept:  # before another text takes the place of the kept one
                known = {name: value for name, value in begun.items() if name != "windows"}
                refuse_differences(unfinished, known, json.loads(json.dumps(fingerprint)))
            try:
                windows = calibration_tokens_by_name(
                    reads_text,
                    calibration,
                    count + held_out,
                    length,
                    seed,
                    device=str(place),
                    keep_in=unfinished / FOLDER,
                    progress=progress,
                )
            except ValueError as error:
                raise ValueError(f"tokens={tokens} and held_out={held_out} ask for this text: {error}") from error
            text = {"windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest()}
            fingerprint, of_teacher = fingerprint | text, of_teacher | text
            if (overwrite or nothing_kept) and is_of_another_run(unfinished, json.loads(json.dumps(fingerprint))):
                discard(unfinished, True, keep_texts=True)
            Journal(unfinished, fingerprint)
            return windows, of_teacher

        def finish() -> RecoveryReport:
            assert model is not None  # in rank 0
            if files is not None:  # it was read again for what is saved
                files.require_unchanged()
            record, masks = find_record(model, source)
            record = dataclasses.replace(record, recoveries=[*record.recoveries, found])
            empty(unfinished)
            write_checkpoint(model, unfinished, record, masks, tokenizer)
            install(unfinished, output, overwrite)
            return found

        windows, of_teacher = ranks.first(begin)
        journal = unfinished / FOLDER
        with ranks.exchanging():
            run = RecoveryTraining(source, teacher, windows, count, options, place, compute, journal, progress, ranks)
            with ExitStack() as trained:
                run.prepare(trained, None if teacher_cache is None else Path(teacher_cache), of_teacher)
                run.train()
            model, found = run.result(calibration)
        return ranks.first(finish)


def steps_kept(output: Path) -> int:
    """Steps of an interrupted run into `output` that its next start resumes after."""
    files = state_files(unfinished_folder(output) / FOLDER)
    return max((step for step, file in files.items() if open_state(file) is not None), default=0)


def _teacher_of(report: PruningReport, source: str) -> str:
    name = str(report.model["name"])
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"teacher is missing: the report of {source!r} calls the dense model {name!r}, which is no Hub id: pass "
            "the folder or Hub id of the dense model (--teacher MODEL)."
        )
    return name


def _require_options(given: Mapping[str, Any]) -> None:
    for name, flag in (("tokens", ""), ("batch_size", ""), ("accumulate", ""), ("held_out", ""), ("top_k", "")):
        if given[name] is not None and given[name] < 1:
            raise ValueError(f"{name}={given[name]}: pass 1 or more{flag}.")
    if given["sequence_length"] is not None and given["sequence_length"] < 2:
        raise ValueError(f"sequence_length={given['sequence_length']}: pass 2 or more.")
    for name, words in (("train", ("auto", *WORDS_OF_TRAIN)), ("compute_dtype", COMPUTE_DTYPES)):
        if given[name] not in words:
            raise ValueError(f"{name}={given[name]!r}: pass {', '.join(words)}.")
    require_seed(given["seed"])
    if given["teacher_cache"] is not None:
        require_cache(Path(given["teacher_cache"]))
    if given["train"] == "lora" and given["processes"] > 1:
        raise ValueError("train='lora': several processes train no adapters: pass all or norms, or start one process.")
    if given["train"] == "lora":
        importlib.import_module("optimum_fista.run.retraining.lora")  # says what to install if PEFT is missing
    if not 0 <= given["label_share"] <= 1:
        raise ValueError(f"label_share={given['label_share']}: pass a number from 0 to 1.")
    if given["learning_rate"] is not None and not given["learning_rate"] > 0:
        raise ValueError(f"learning_rate={given['learning_rate']}: pass a positive number.")


def _require_same_vocabulary(source: str, config: PreTrainedConfig, teacher: str) -> None:
    """Refuse a teacher whose predictions are of other tokens."""
    theirs = read_config(teacher)
    sizes = [c.get_text_config(decoder=True).vocab_size for c in (config, theirs)]
    tokenizers = [load_tokenizer(source), load_tokenizer(teacher)]
    known = [t.get_vocab() for t in tokenizers if isinstance(t, PreTrainedTokenizerBase)]
    if sizes[0] != sizes[1] or (len(known) == 2 and known[0] != known[1]):
        raise ValueError(
            f"teacher={teacher!r} has another vocabulary ({sizes[1]:,} tokens) than {source!r} ({sizes[0]:,}): pass "
            "the dense model that this one was pruned from."
        )


def _files(name: str, progress: bool) -> SourceFiles | None:
    """What identifies the weights and the configuration of a model; `None`: its Hub id does."""
    return SourceFiles(Path(name), {}, progress) if Path(name).is_dir() else None
