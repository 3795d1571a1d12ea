"""Plan a recovery: check its options, choose which weights to train, and estimate memory and time.

A recovery trains the *student* (the pruned model) so that it predicts as the *teacher* (the dense model) does.
`plan_recovery` makes the plan before anything large is read, from configurations, tokenizers and a model without
weights. `recover` then trains by it, after `choose` has found what fits into memory (a `Choice`). `plan_text` writes
the plan for people. Nothing here writes a file of the run.

A *step* is one update of the weights. It sums the gradients of several *passes* (forward and backward), each of
`batch_size` sequences. Numbers of passes are those of all processes together. The source of text "self" means that the
teacher writes it.
"""

import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from optimum_fista import internals
from optimum_fista.devices import usable_device
from optimum_fista.folder.checkpoint import (
    CONFIG_KEY,
    REPORT_FILE,
    VOCABULARY_FILE,
    kept_tokens,
    read_recoveries,
    read_report,
)
from optimum_fista.folder.output import folder_beside, require_output, unfinished_folder
from optimum_fista.memory import size_text
from optimum_fista.model.choice import find_operators
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.precision import is_fast
from optimum_fista.model.predictor import LOGITS_PER_CHUNK
from optimum_fista.recovery_report import WORDS_OF_TRAIN, RecoveryReport
from optimum_fista.report import PruningReport
from optimum_fista.source.loading import (
    forget_gguf,
    load_tokenizer,
    model_without_weights,
    read_config,
    read_model,
    require_tokenizer,
)
from optimum_fista.source.model_folder import CONFIG_FILE
from optimum_fista.text.calibration_tokens import usual_length
from optimum_fista.text.one_text import require_different
from optimum_fista.text.sources import require_source
from optimum_fista.train.recovery_options import RecoveryOptions
from optimum_fista.train.training import pruned_folder

_USUAL_LENGTH = 512  # tokens in a sequence
_USUAL_STEPS = 256
_MOST_SEQUENCES = 32  # in a step, if the user does not say how many
# About how far a step moves weights, as a share of the root mean square of their tensor, by what is trained.
_RELATIVE_STEPS = {"all": 1e-3, "norms": 1e-2}
_MARGIN = 0.9  # of the memory that is free: the rest is for what is not counted


@dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """Names and numbers of a recovery: its models, its text, its output, its steps."""

    source: str  # folder of the pruned model
    teacher: str  # folder of the dense model
    teacher_name: str  # folder or Hub id, as the user gave it
    # Sources of the text: ("self",) if the teacher writes it, or what `load_text` takes.
    calibration: tuple[str, ...]
    text_model: str  # folder of the model whose tokenizer reads the text, or which writes it
    output: Path
    options: RecoveryOptions
    length: int  # tokens in a sequence
    passes_of_step: int  # of all processes together (the option `accumulate`, or a usual number)
    steps: int
    device: torch.device
    compute_dtype: torch.dtype  # of products; weights are trained in float32
    report: PruningReport | None  # of the pruned model; `None`: the model was never pruned
    recoveries: list[RecoveryReport]  # earlier trainings of a model that was never pruned, in order
    # The teacher's token for each token of the student, int64 [student's tokens]; `None` if both have the same tokens.
    kept_tokens: Tensor | None

    @property
    def num_sequences(self) -> int:
        """Sequences that are trained on, each once."""
        return self.steps * self.passes_of_step * self.options.batch_size

    @property
    def teacher_writes_text(self) -> bool:
        """Whether the teacher writes the text that is trained on."""
        return self.calibration == ("self",)

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher's predictions count in the loss; otherwise the text alone does."""
        return self.options.label_share < 1

    def relative_step(self, train: str) -> float:
        """About how far a step moves weights, as a share of the root mean square of their tensor.

        `train` is what is trained, "all" or "norms"; the option of the user, if there is one, counts for both.
        """
        if self.options.relative_step is not None:
            return self.options.relative_step
        return _RELATIVE_STEPS[train]


@dataclass(frozen=True)
class Choice:
    """The kind of training, and the memory that it takes; `choose` makes it."""

    train: str  # "all" or "norms"
    checkpointed: bool  # whether decoder layers compute their activations twice
    num_trained: int  # weights, zeros aside
    # Of both models, gradients, moments and activations, on the device of one process.
    num_bytes: int

    def __str__(self) -> str:
        """Say in a line for people what is trained, how much memory that takes, and whether layers compute twice."""
        twice = ", with activations that are computed twice" if self.checkpointed else ""
        return (
            f"{self.num_trained:,} parameters are trained ({WORDS_OF_TRAIN[self.train]}), which takes about "
            f"{size_text(self.num_bytes)} of memory{twice}"
        )


def plan_recovery(
    folder: str | Path,
    teacher: str | Path | None,
    output_dir: str | Path | None,
    *,
    calibration: str | Path | Sequence[str | Path],
    device: str | None,
    overwrite: bool,
    processes: int,
    **options: Any,
) -> RecoveryPlan:
    """Check all that can be checked without weights and text, and make the plan.

    Models of the Hub are downloaded into its cache: configurations and tokenizers for the checks, weights after them.
    Nothing is written to `output_dir`, but files that a killed process left beside it are removed.

    Args:
        folder: The model to train: a folder or Hub id.
        teacher: Folder or Hub id of the dense model; `None`: the report of the pruned model names it.
        output_dir: Where the result will be written; `None`: the name of `folder` with "-recovered".
        calibration: The source of the text, or several: "self", or what `load_text` takes, such as "c4" or a path.
        device: Where to compute, such as "cuda:0"; `None`: the accelerator if there is one.
        overwrite: Whether a model that the output holds may be replaced.
        processes: How many processes train together.
        options: Fields of `RecoveryOptions`.
    """
    checked = RecoveryOptions(**options)  # raises ValueError for an option that makes no sense
    source = str(folder)
    report = _report_of(source)
    teacher_name = _teacher_name(source, report, teacher)

    # Neither of the models may be overwritten. If the output is refused, files that a killed process left beside it are
    # removed.
    output = folder_beside(source, "-recovered") if output_dir is None else Path(output_dir)
    for name in (source, teacher_name):
        require_output(output, overwrite, source=name)
    if checked.teacher_logits is not None:
        _require_apart(
            Path(checked.teacher_logits),
            (output, unfinished_folder(output), Path(source), Path(teacher_name)),
        )

    texts = _sources_of_text(calibration)
    _require_texts(texts, checked)
    teacher_writes_text = texts == ("self",)

    configs = {name: read_config(name) for name in (source, teacher_name)}
    tokenizers = {name: load_tokenizer(name) for name in (source, teacher_name)}
    # the teacher's id of each token of the student; None if both have the same tokens
    kept_tokens = _match_vocabularies(source, teacher_name, configs, tokenizers)
    if kept_tokens is not None and teacher_writes_text:
        raise ValueError(
            f"calibration='self': the teacher would write tokens that {source!r} lacks: pass a text."
        )

    # Whose tokenizer reads the text, or who writes it.
    student_reads_text = not teacher_writes_text and tokenizers[source] is not None
    text_model = source if student_reads_text else teacher_name
    require_tokenizer(text_model)

    length = _sequence_length(checked.sequence_length, configs)
    passes_of_step = _passes_of_step(checked, length, processes)
    steps = _num_steps(checked, length, passes_of_step)
    num_sequences = steps * passes_of_step * checked.batch_size
    if num_sequences < len(texts):
        raise ValueError(
            f"tokens={checked.tokens} (--tokens) give {num_sequences} sequences, and there are {len(texts)} texts: "
            "pass more tokens."
        )
    used_device = usable_device(device)
    compute_dtype = _compute_dtype(checked, used_device)

    # Everything is checked: weights of models of the Hub are downloaded now.
    source_folder = _folder_of_student(source)
    teacher_folder = _folder_of_teacher(teacher_name)
    return RecoveryPlan(
        source=source_folder,
        teacher=teacher_folder,
        teacher_name=teacher_name,
        calibration=texts,
        text_model=source_folder if student_reads_text else teacher_folder,
        output=output,
        options=checked,
        length=length,
        passes_of_step=passes_of_step,
        steps=steps,
        device=used_device,
        compute_dtype=compute_dtype,
        report=report,
        recoveries=read_recoveries(Path(source_folder)) if report is None else [],
        kept_tokens=kept_tokens,
    )


def _sources_of_text(calibration: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """Return the sources of the text, each as a string; ValueError if the argument is of another kind, or empty."""
    sources = (calibration,) if isinstance(calibration, str | Path) else calibration
    is_list = isinstance(sources, list | tuple) and len(sources) > 0
    if not is_list or not all(isinstance(source, str | Path) for source in sources):
        raise ValueError(
            f"calibration={calibration!r}: pass 'self', a text such as 'texts.txt' or 'c4', or a list of texts."
        )
    return tuple(map(str, sources))


def _require_texts(sources: Sequence[str], options: RecoveryOptions) -> None:
    """Refuse sources of text that can't be read, or that do not go together or with the options (ValueError).

    `sources` are "self" alone, if the teacher writes the text, or what `load_text` takes. Each of several sources gives
    an equal share of the sequences, and of those that are held out. No text is read.
    """
    number = len(sources)
    require_different(sources)
    if "self" in sources:
        if number > 1:
            raise ValueError(
                "calibration='self' (--calibration self) with other texts: a text that the teacher writes is not mixed "
                "with others: pass 'self' alone, or only the other texts."
            )
        if options.answers_only:
            raise ValueError(
                "answers_only=True: a text that the teacher writes itself has no conversations: pass calibration "
                "(--calibration), a text that has some."
            )
        return
    for source in sources:
        require_source(source)
    if options.held_out < number:
        raise ValueError(
            f"held_out={options.held_out} (--held-out): pass at least {number}, one sequence of each text."
        )


def _report_of(source: str) -> PruningReport | None:
    """Read the report of the model to train, a folder or Hub id; `None` if the model was never pruned.

    Refuses a model whose configuration says that it was pruned, but whose report is missing: nobody knows its masks.
    Files of a Hub id are downloaded into the cache.
    """
    if internals.cached_file_if_any(source, REPORT_FILE) is not None:
        return read_report(pruned_folder(source))
    if getattr(read_config(source), CONFIG_KEY, None) is not None:
        raise FileNotFoundError(
            f"{source!r} holds no {REPORT_FILE}, but its config.json says that it was pruned: pass the whole folder "
            "that optimum-fista saved."
        )
    return None


def _teacher_name(source: str, report: PruningReport | None, teacher: str | Path | None) -> str:
    """The name of the teacher that the user gave, or else the Hub id in the report of the pruned model `source`.

    A model that was never pruned, without a report, is its own teacher.
    """
    if teacher is not None:
        return str(teacher)
    if report is None:
        return source

    name = report.first_model.name
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    if not is_hub_id:
        raise ValueError(
            f"teacher is missing: the report of {source!r} calls the dense model {name!r}, which is no Hub id: "
            "pass the folder or Hub id of it (--teacher MODEL)."
        )
    return name


def _folder_of_student(name: str) -> str:
    """The folder of a model that is given as folder or Hub id; all files of the latter are downloaded."""
    if Path(name).is_dir():
        return name
    return snapshot_download(name)


def _folder_of_teacher(name: str) -> str:
    """The folder of a model that is given as folder or Hub id; of the latter, only the model is downloaded."""
    if Path(name).is_dir():
        return name
    # Only to download the files that a model needs; the model is dropped.
    read_model(name, device_map="meta")
    config_file = Path(str(cached_file(name, CONFIG_FILE)))  # of the commit that main is at now
    return str(config_file.parent)


def _match_vocabularies(
    source: str,
    teacher: str,
    configs: Mapping[str, PreTrainedConfig],
    tokenizers: Mapping[str, PreTrainedTokenizerBase | None],
) -> Tensor | None:
    """Find the teacher's token for each token of the student; refuse models whose tokens are different ones.

    Returns ids, int64 [student's tokens], if tokens were removed from the student, and `None` if both have the same
    tokens. `source` (the student) and `teacher` are folders or Hub ids. They are the keys of `configs` and of
    `tokenizers`, where `None` stands for a folder without a tokenizer. A small file of a model of the Hub may be
    downloaded into its cache; nothing else changes.
    """
    # numbers of tokens, by folder or Hub id
    sizes = {
        name: config.get_text_config(decoder=True).vocab_size for name, config in configs.items()
    }
    kept_tokens = None
    fit_together = sizes[source] == sizes[teacher]
    if sizes[source] < sizes[teacher]:  # tokens were removed from the student
        kept_tokens = _kept_tokens_of(source, teacher, sizes)
        fit_together = kept_tokens is not None
    if fit_together:
        fit_together = _have_same_tokens(tokenizers[source], tokenizers[teacher], kept_tokens)

    if not fit_together:
        raise ValueError(
            f"teacher={teacher!r} has another vocabulary ({sizes[teacher]:,} tokens) than {source!r} "
            f"({sizes[source]:,}): pass the dense model that this one was pruned from."
        )
    return kept_tokens


def _have_same_tokens(
    students_tokenizer: PreTrainedTokenizerBase | None,
    teachers_tokenizer: PreTrainedTokenizerBase | None,
    kept_tokens: Tensor | None,
) -> bool:
    """Tell whether every token of the student has the same id in both tokenizers; True if one of them is missing.

    `kept_tokens` has the teacher's id of each token of the student, int64 [student's tokens]; `None`: both have the
    same ids.
    """
    if students_tokenizer is None or teachers_tokenizer is None:
        return True
    # Ids by token.
    students_ids = students_tokenizer.get_vocab()
    teachers_ids = teachers_tokenizer.get_vocab()
    if kept_tokens is None:
        return students_ids == teachers_ids

    # Ids of the student's tokenizer that have no row in its embedding do not count.
    translated_ids = {
        token: int(kept_tokens[index])
        for token, index in students_ids.items()
        if index < len(kept_tokens)
    }
    return all(
        teachers_ids.get(token) == index_of_teacher
        for token, index_of_teacher in translated_ids.items()
    )


def _kept_tokens_of(source: str, teacher: str, sizes: Mapping[str, int]) -> Tensor | None:
    """The teacher's id of each token of a student (`source`) with fewer tokens; `None` if they do not fit together.

    Returns int64 [student's tokens]. The student's folder has a file of the tokens that stay (`VOCABULARY_FILE`); the
    teacher's may have one, too, because an earlier run may have removed tokens from it. `source` and `teacher` are
    folders or Hub ids, whose files are downloaded into the Hub's cache. `sizes` are numbers of tokens by these names.
    """
    file = internals.cached_file_if_any(source, VOCABULARY_FILE, needs_hub=False)
    teachers_file = internals.cached_file_if_any(teacher, VOCABULARY_FILE, needs_hub=False)
    if file is None:
        return None

    # The file is in a subfolder ("fista") of the model's folder.
    students_folder = Path(file).parents[1]
    teachers_folder = None if teachers_file is None else Path(teachers_file).parents[1]
    # Ids in the teacher. If the teacher has lost tokens itself, its file translates them.
    tokens = kept_tokens(students_folder, teachers_folder)
    if tokens is None or len(tokens) != sizes[source]:
        return None
    teacher_lacks_some = int(tokens.max()) >= sizes[teacher]
    return None if teacher_lacks_some else tokens


def _sequence_length(wanted: int | None, configs: Mapping[str, PreTrainedConfig]) -> int:
    """Choose how many tokens a sequence has: as many as the user wants, or a usual number that both models take.

    `wanted` is the number that the user wants, `None` if it was not said. `configs` are the configurations of student
    and teacher, by folder or Hub id. A model that takes fewer tokens than `wanted` is refused. Changes nothing.
    """
    if wanted is None:
        # of each model 2048, or its context if that is shorter
        lengths = [usual_length(config) for config in configs.values()]
        return min(_USUAL_LENGTH, *lengths)

    for name, config in configs.items():
        limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit and wanted > limit:
            raise ValueError(
                f"sequence_length={wanted}: {name!r} takes at most {limit} tokens: pass at most {limit} "
                "(--sequence-length)."
            )
    return wanted


def _passes_of_step(options: RecoveryOptions, length: int, processes: int) -> int:
    """Choose how many passes a step has, of all processes together: a multiple of the number of `processes`.

    `options.accumulate` is the number that the user wants; one that the processes can't share is refused. If it is
    `None`, the passes of a step are chosen so that there are about 256 steps, with at most 32 sequences each. `length`
    is the number of tokens of a sequence.
    """
    if options.accumulate is not None:
        if options.accumulate % processes:
            raise ValueError(
                f"accumulate={options.accumulate}: {processes} processes share the passes of a step: pass a multiple "
                f"of {processes} (--accumulate)."
            )
        return options.accumulate

    sequences_of_step = options.tokens // (_USUAL_STEPS * length)  # if there are 256 steps
    sequences_of_step = min(sequences_of_step, _MOST_SEQUENCES)
    passes = max(1, sequences_of_step // options.batch_size)
    passes_of_process = math.ceil(passes / processes)
    return processes * passes_of_process


def _num_steps(options: RecoveryOptions, length: int, passes_of_step: int) -> int:
    """Count the whole steps in the tokens that the user wants to train on; ValueError if there is none.

    `length` is the number of tokens of a sequence.
    """
    tokens_of_step = length * options.batch_size * passes_of_step
    if options.tokens < tokens_of_step:
        raise ValueError(
            f"tokens={options.tokens}: one step takes {passes_of_step} passes of {options.batch_size} sequences of "
            f"{length} tokens: pass at least {tokens_of_step} (--tokens), or shorter sequences (--sequence-length)."
        )
    return options.tokens // tokens_of_step


def _compute_dtype(options: RecoveryOptions, device: torch.device) -> torch.dtype:
    """The dtype of products that the user wants; "auto" is bfloat16 if the device is fast in it, else float32."""
    if options.compute_dtype == "auto":
        uses_bfloat16 = is_fast(torch.bfloat16, device)
    else:
        uses_bfloat16 = options.compute_dtype == "bfloat16"
    return torch.bfloat16 if uses_bfloat16 else torch.float32


@dataclass(frozen=True)
class _Sizes:
    """Numbers of a student from which the memory of its training follows."""

    parameters: int
    inner_parameters: int  # parameters without embeddings and head
    vectors: int  # inner parameters that are no matrices: norms and biases
    layers: int
    hidden_size: int
    vocabulary: int
    operator_width: int  # inputs and outputs of all linear operators of the decoder layers
    can_checkpoint: bool  # whether decoder layers can compute their activations twice

    @classmethod
    def of(cls, source: str) -> "_Sizes":
        """Count the numbers on a model without weights, which is made here; `source` is the student's folder.

        "Inner" are all parameters but embeddings and head. Only the configuration is read.
        """
        model = model_without_weights(read_config(source))
        config = model.config.get_text_config(decoder=True)
        inner = _inner_parameters(model)
        layers = find_decoder_layers(model)

        operator_width = 0
        for name, layer in layers:
            # "*" leaves out all experts of mixtures
            for operator in find_operators(name, layer, dense_experts=["*"]).values():
                operator_width += sum(operator.shape)

        return cls(
            parameters=model.num_parameters(),
            inner_parameters=sum(parameter.numel() for parameter in inner),
            vectors=sum(parameter.numel() for parameter in inner if parameter.ndim == 1),
            layers=len(layers),
            hidden_size=config.hidden_size,
            vocabulary=config.vocab_size,
            operator_width=operator_width,
            can_checkpoint=model.supports_gradient_checkpointing,
        )

    def trained(self, train: str) -> int:
        """Count the parameters that a training of "all" or "norms" changes, with those that are zero."""
        return self.inner_parameters if train == "all" else self.vectors


def choose(plan: RecoveryPlan, free: Sequence[int | None]) -> Choice:
    """Choose the first kind of training that fits into memory; activations are computed twice only if needed.

    The kinds are, in order, the training of all kept weights, and of norms and biases alone, as far as the user allows
    both (`plan.options.train`). `free` are the free bytes on the device of each process, `None` if they are not known.
    If nothing fits, the last kind is chosen. Reads the configuration of the student, and changes nothing.
    """
    sizes = _Sizes.of(plan.source)
    kinds = ["all", "norms"] if plan.options.train == "auto" else [plan.options.train]
    # whether activations are computed twice
    ways = [False, True] if sizes.can_checkpoint else [False]
    choices = [
        _choice(plan, sizes, train, checkpointed=checkpointed)
        for train, checkpointed in itertools.product(kinds, ways)
    ]

    limit = _limit_of_process(plan, free)
    for choice in choices:
        if choice.num_bytes <= limit:
            return choice
    return choices[-1]


def _limit_of_process(plan: RecoveryPlan, free: Sequence[int | None]) -> float:
    """Return how many bytes a process may take on its device; infinity if no number of `free` is known.

    `free` are the free bytes on the device of each process, `None` if they are not known. The process with the least
    memory decides for all.
    """
    known = [num_bytes for num_bytes in free if num_bytes is not None]
    if not known:
        return math.inf

    # Processes on one CPU share its memory. Every process has an accelerator of its own.
    processes_sharing = 1
    if plan.device.type == "cpu":
        processes_sharing = int(os.environ.get("LOCAL_WORLD_SIZE", len(free)))
    return _MARGIN * min(known) / processes_sharing


def _choice(plan: RecoveryPlan, sizes: _Sizes, train: str, *, checkpointed: bool) -> Choice:
    """Describe one kind of training: how many weights it trains, and about how many bytes it takes.

    `sizes` are the numbers of the student. The arguments `train` and `checkpointed` are those of `Choice`.
    """
    zeros = 0
    if plan.report is not None and train == "all":
        zeros = plan.report.num_zeros
    num_bytes = _needed_bytes(
        plan, sizes, train, checkpointed=checkpointed, is_sharded=shards_weights()
    )
    return Choice(
        train=train,
        checkpointed=checkpointed,
        num_trained=sizes.trained(train) - zeros,
        num_bytes=num_bytes,
    )


def _require_apart(teacher_logits: Path, folders: Sequence[Path]) -> None:
    """Refuse a folder for the teacher's predictions that is one of the `folders`, or in one; ValueError.

    These are the output, which may hold no other files at the end, its unfinished folder, which is deleted then, and
    the models, which may not change meanwhile.
    """
    real = Path(os.path.realpath(teacher_logits))
    for folder in folders:
        if real.is_relative_to(os.path.realpath(folder)):
            raise ValueError(
                f"teacher_logits={str(teacher_logits)!r} lies in {str(folder)!r}, which is the output, its "
                "unfinished folder or a model: pass a folder outside of it (--teacher-logits)."
            )


def _needed_bytes(
    plan: RecoveryPlan, sizes: _Sizes, train: str, *, checkpointed: bool, is_sharded: bool
) -> int:
    """Estimate the bytes on the device of a process that trains "all" or "norms" (`train`); changes nothing.

    Logits are counted for one chunk of positions: a model is cut before its head. Whether it really can be cut is known
    only after it has run. Weights are counted whole even if processes share them, so the estimate is too high then.

    Args:
        plan: The recovery: its length of sequences, batch size, dtype of products.
        sizes: Numbers of the whole student; `operator_width` sums the inputs and outputs of all linear operators of all
            decoder layers.
        train: What is trained.
        checkpointed: Whether activations are computed twice, so that only those of one layer are in memory.
        is_sharded: Whether processes share the weights (`shards_weights`). Such models are not cut, so the logits of a
            whole pass are in memory.
    """
    # In float32, 4 bytes each: the weights, and of those that are trained a gradient and two moments.
    student_bytes = 4 * sizes.parameters + 12 * sizes.trained(train)
    if plan.compute_dtype != torch.float32 and not is_sharded:
        # the copy of the head's weight that `round_head` makes
        student_bytes += plan.compute_dtype.itemsize * sizes.vocabulary * sizes.hidden_size
    mask_bytes = sizes.parameters if train == "all" else 0  # a byte a weight

    tokens = plan.options.batch_size * plan.length
    activation_bytes = tokens * _activation_bytes_of_token(sizes, checkpointed=checkpointed)

    # 20 bytes for a logit: those of both models, in two dtypes, with their gradient.
    logits_bytes = 20 * min(LOGITS_PER_CHUNK, tokens * sizes.vocabulary)
    if is_sharded:  # whole ones of both models, with the gradient of one
        logits_bytes += 3 * plan.compute_dtype.itemsize * tokens * sizes.vocabulary

    training_bytes = student_bytes + mask_bytes + activation_bytes + logits_bytes
    teacher_bytes = _bytes_of_teacher(plan, sizes)
    if plan.has_teacher and plan.options.teacher_logits is None:
        return training_bytes + teacher_bytes
    # Here the teacher is not in memory during the training. Before it, the teacher stores its predictions or writes
    # the text, or it is not loaded at all.
    if plan.has_teacher or plan.teacher_writes_text:
        return max(training_bytes, teacher_bytes + logits_bytes)
    return training_bytes


def _activation_bytes_of_token(sizes: _Sizes, *, checkpointed: bool) -> int:
    """Estimate the bytes of the student's activations for one token; `checkpointed`: they are computed twice."""
    # the inputs and outputs of all operators, with 8 bytes for each number
    bytes_of_layers = 8 * sizes.operator_width
    if checkpointed:
        # those of one layer at a time, and the hidden states that enter each layer
        bytes_of_hidden_states = 4 * sizes.layers * sizes.hidden_size
        bytes_of_layers = bytes_of_layers // sizes.layers + bytes_of_hidden_states
    # hidden states that enter both heads, and their gradient, each 4 bytes
    bytes_of_heads = 12 * sizes.hidden_size
    return bytes_of_layers + bytes_of_heads


def _bytes_of_teacher(plan: RecoveryPlan, sizes: _Sizes) -> int:
    """Count the bytes of the teacher's weights, in the dtype of products; `sizes` are the numbers of the student.

    If the report does not say how many parameters the dense model has, they are taken to be as many as the student's.
    """
    num_parameters = sizes.parameters
    if plan.report is not None and plan.report.first_model.num_parameters:
        num_parameters = plan.report.first_model.num_parameters
    return num_parameters * plan.compute_dtype.itemsize


def load_student(source: str) -> PreTrainedModel:
    """Load the pruned model of the folder `source` to the CPU, in the dtypes of its files.

    A quantized model is dequantized. A model from a GGUF file gets a configuration that does not say so. Dropout and
    jitter of routers are turned off in the configuration, so that two passes give the same result. Files are only read.
    """
    config = read_config(source)
    # the section of the text decoder; in a model of text it is the same object, and then the loop changes nothing more
    text_config = config.get_text_config(decoder=True)
    for section in (config, text_config):
        settings = dict(vars(section))  # a copy, because the loop changes the attributes
        for name, value in settings.items():
            is_random = "drop" in name or "jitter" in name
            if is_random and isinstance(value, float):
                setattr(section, name, 0.0)
    model = read_model(source, dtype="auto", config=config)
    forget_gguf(model)
    return model


def mark_trained(model: PreTrainedModel, train: str) -> None:
    """Turn on gradients for the parameters of `model` to train ("all" or "norms"), and off for all others.

    "norms" are all vectors, so biases, too. "all" are the matrices, too. Embeddings and head are never trained.
    """
    model.requires_grad_(False)
    for parameter in _inner_parameters(model):
        is_norm_or_bias = parameter.ndim == 1
        parameter.requires_grad_(train == "all" or is_norm_or_bias)


def shards_weights() -> bool:
    """Tell whether Accelerate shards the weights (FSDP), as its launcher has asked for by an environment variable.

    The head of a sharded model is whole only inside a call of the whole model. So such a model is not cut before its
    head, and its head is left as it is.
    """
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def round_head(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the head of `model`, which is not trained, a new weight: its own, rounded to the dtype of the products.

    Products are computed in `dtype` by autocast, which would round the weight again for each chunk of positions. With a
    large vocabulary this would take longer than the product. The old weight stays as it is: an embedding that shares it
    keeps it. From then on the model runs inside autocast only, because its hidden states have another dtype.
    """
    # Usually a linear layer. `None`, or a module of another kind, stays as it is.
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        head.weight = nn.Parameter(head.weight.detach().to(dtype), requires_grad=False)


def _inner_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of a model without those of embeddings and head, which are large and are never pruned."""
    head = model.get_output_embeddings()
    outer_modules = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module is head
    }
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in outer_modules  # the name of the parameter's module
    ]


def plan_text(plan: RecoveryPlan, choice: Choice, free: int | None, duration: str) -> str:
    """Write the plan of a recovery as a few lines of text, each with a name before it. Changes nothing.

    `free` are the free bytes of the device, `None` if they are not known. `duration` says how long the run takes, such
    as "about 03:20, 1.5 seconds a step".
    """
    options = plan.options
    teacher = plan.teacher_name
    if plan.kept_tokens is not None:
        teacher += f", its predictions of {len(plan.kept_tokens):,} tokens"
    if options.teacher_logits is not None:
        teacher += f", the {options.top_k} most likely tokens, stored in {options.teacher_logits}"
    if not plan.has_teacher:
        teacher += ", not loaded for the training: the text alone counts (label_share is 1)"
    memory = f"{size_text(choice.num_bytes)} on {plan.device}"
    if free:
        memory += f", {size_text(free)} are free"

    counted = "; only answers count in the loss" if options.answers_only else ""

    parameters = _Sizes.of(plan.source).parameters  # of the student, by its configuration
    name_of_student = "pruned" if plan.report else "model"  # the report of a pruning run
    lines = {
        name_of_student: f"{plan.source}, {parameters:,} parameters",
        "teacher": teacher,
        "trained": str(choice),
        "text": f"{plan.num_sequences * plan.length:,} tokens of {', '.join(plan.calibration)}, {plan.steps} steps of "
        f"{plan.passes_of_step} x {options.batch_size} sequences of {plan.length} tokens; "
        f"{options.held_out} more sequences are held out{counted}",
        "steps": f"each moves weights by about {plan.relative_step(choice.train):.3%} of their root mean square",
        "memory": memory,
        "time": duration,
        "output": str(plan.output),
    }
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())
