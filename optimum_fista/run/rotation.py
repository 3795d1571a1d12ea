"""A dense model with a rotated residual stream: it computes the same, and loses less when it is pruned."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista.model.architecture import input_embedding, require_bare
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.evaluation_mode import evaluation_mode
from optimum_fista.model.experts import is_fused_experts
from optimum_fista.model.loss_gradients import DenseLoss
from optimum_fista.model.products import COMPUTE_DTYPES, compute_dtype_of, quick_products, quick_products_in
from optimum_fista.model.stream_search import find_residual_stream, unsupported
from optimum_fista.run.checkpoints.atomic import errors_of_writing, require_room
from optimum_fista.run.checkpoints.checkpoint import CARD_FILE
from optimum_fista.run.checkpoints.checkpoint import CONFIG_KEY as PRUNED_KEY
from optimum_fista.run.checkpoints.loading import load_model, read_config, require_unquantized, usable_device
from optimum_fista.run.checkpoints.output_folder import MODEL_FILES, require_output
from optimum_fista.run.checkpoints.writing import new_output
from optimum_fista.run.config import require_seed
from optimum_fista.run.environment import numerical_environment
from optimum_fista.run.reports.report import public_name
from optimum_fista.run.texts.calibration_source import calibration_tokens, usual_length
from optimum_fista.run.texts.explained_errors import explained_length
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.patterns import WholeParts, parse_pattern
from optimum_fista.solve.rotation import random_rotation, train_rotation

CONFIG_KEY = "fista_rotation"
_USUAL_LENGTH = 512
_ROUNDING = 1e-3
"""Largest relative difference of a token's logits that rounding explains; 24 random decoder layers come to 2e-5."""


@dataclass(frozen=True)
class RotationReport:
    """What a rotation of the residual stream was trained on, and what it did; `config.json` holds it.

    Attributes:
        model: Name of the dense model: a Hub id, or the name of its folder.
        pattern: The sparsity pattern that it was trained for.
        sparsity: Its fraction of zeros.
        error_ratio: The error that the pattern is predicted to cause after the rotation, divided by that before it: a
            geometric mean over groups of operators (`solve.rotation`).
        difference: Relative difference of the logits on a calibration sequence before and after, in float32.
        num_parameters: Parameters of the model before and after: a head that shared the embedding gets its own.
        calibration: Name of the text.
        num_tokens: Number of calibration tokens.
        steps: Steps of the training.
        learning_rate: Its largest learning rate.
        seed: Its seed, and that of the text.
        seconds: What it took, from loading the model until it is saved.
        version: Version of optimum-fista.
    """

    model: str
    pattern: str
    sparsity: float
    error_ratio: float
    difference: float
    num_parameters: tuple[int, int]
    calibration: str
    num_tokens: int
    steps: int
    learning_rate: float
    seed: int
    seconds: float
    version: str

    def __str__(self) -> str:
        """A few lines for people."""
        before, after = self.num_parameters
        grown = f"\nthe head has its own weight now: {after / before - 1:+.1%} parameters" if after != before else ""
        return (
            f"rotated for {self.pattern if self.pattern != 'unstructured' else f'{self.sparsity:.0%} zeros'} in "
            f"{self.seconds:.0f} s: the predicted error is {self.error_ratio:.3f} times that before\n"
            f"the model computes the same: in float32 its logits differ by {self.difference:.1e}{grown}"
        )


@numerical_environment()
def rotate(
    model: str | Path,
    output_dir: str | Path,
    *,
    pattern: str = "2:4",
    sparsity: float | None = None,
    calibration: str = "self",
    tokens: int = 4096,
    sequence_length: int | None = None,
    steps: int = 200,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    compute_dtype: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> RotationReport:
    """Save a dense model that computes the same in another basis, and loses less when it is pruned.

    The logits stay what they are, up to rounding. The gains of the norms move into the operators that read them, every
    operator that reads the stream gets `W R`, and what adds to it `R^T W` (arXiv 2401.15024, 2404.00456). `R` is
    trained to make the predicted error of the pattern small (`solve.rotation.train_rotation`). The folder is an
    ordinary dense model: prune it with the same pattern.

    The whole model is on the device in float32, with a matrix [hidden, hidden] for every norm and every writer: four of
    a usual decoder layer.

    Args:
        model: A Hub id, a model folder, or a folder with one GGUF file.
        output_dir: Where to write the rotated model.
        pattern: The sparsity pattern that is meant for it.
        sparsity: The fraction of zeros of an `"unstructured"` pattern.
        calibration: The text: `"self"` (the model writes it) or a source of `run.texts.text.load_text`.
        tokens: Tokens to measure inputs and gradients on, in whole sequences, at least one.
        sequence_length: Tokens a sequence; `None`: 512, or the model's maximum if that is shorter.
        steps: Steps of the training.
        learning_rate: Its largest learning rate.
        seed: Decides which text is drawn, and which weights a step looks at.
        device: Where to compute; `None`: the accelerator unless it is MPS, otherwise the CPU.
        dtype: Dtype to save in; `"auto"` takes the checkpoint's.
        compute_dtype: Dtype of products while it measures and trains: `"float32"`, `"bfloat16"`, or `"auto"`, bfloat16
            if the device is fast in it. Weights are rotated in float64.
        overwrite: Replace a model that `output_dir` already holds.
        progress: Whether to show a progress bar.

    Returns:
        What it did; `config.json` holds it under `fista_rotation`.

    Raises:
        ValueError: If an option is out of range, the model is pruned, quantized or damaged, the pattern does not fit
            it, the text is too short, its sequences are too long for the model, gradients are not finite, or a rotated
            weight is too large for the dtype.
        UnsupportedArchitectureError: If a rotation would change what the model computes (a ValueError).
        FileExistsError: If `output_dir` holds a model already, or has an unfinished run, and `overwrite` is False, or
            it holds files of something else.
        BlockingIOError: If another run writes to `output_dir`.
        OSError: If there is no such model, or the disk is full.
    """
    source, output, started = str(model), Path(output_dir), time.perf_counter()
    aim = _require_options(pattern, sparsity, tokens, sequence_length, steps, learning_rate, seed, compute_dtype)
    place = usable_device(device)
    names = [name for name in MODEL_FILES if name != CARD_FILE]  # it writes none
    require_output(output, overwrite, source=source, names=names)
    config = read_config(source)
    if getattr(config, PRUNED_KEY, None) is not None:
        raise ValueError(f"model={source!r} was pruned: a rotation fills its zeros. Pass the dense model.")
    length = min(_USUAL_LENGTH, usual_length(config)) if sequence_length is None else sequence_length
    with new_output(output, overwrite) as folder:
        dense, tokenizer = load_model(source, device=str(place), dtype=dtype)
        require_unquantized(dense)
        require_bare(dense)
        stored = _in_float32(dense)
        require_room(folder, sum(tensor.numel() * stored[name].itemsize for name, tensor in _tensors(dense)))
        try:
            count = max(1, tokens // length)
            ids = calibration_tokens(calibration, dense, tokenizer, count, length, seed, progress=progress)
        except ValueError as error:
            raise ValueError(f"calibration={calibration!r}, tokens={tokens}: {error}") from error
        with (
            evaluation_mode(dense),
            quick_products_in(compute_dtype_of(compute_dtype, place)),
            explained_length(dense, ids.shape[1], "calibration"),
        ):
            parameters = dense.num_parameters()
            ratio, difference = rotate_model(dense, ids, aim, steps, learning_rate, seed, progress)
        _round(dense, stored)
        report = RotationReport(
            model=public_name(source),
            pattern=aim.text,
            sparsity=aim.sparsity,
            error_ratio=ratio,
            difference=difference,
            num_parameters=(parameters, dense.num_parameters()),
            calibration=public_name(calibration),
            num_tokens=ids.numel(),
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            seconds=time.perf_counter() - started,
            version=version("optimum-fista"),
        )
        setattr(dense.config, CONFIG_KEY, asdict(report))
        with errors_of_writing(folder):
            dense.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return report


def _in_float32(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Convert a model; returns the dtypes that its tensors had: Transformers keeps biases of routers in float32.

    Raises:
        ValueError: If a parameter holds NaN or Inf.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"{name} holds NaN or Inf: the model is damaged, download it again.")
    dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
    torch.nn.Module.float(model)
    return dtypes


def _round(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Convert a model back.

    Raises:
        ValueError: If a value is too large for its dtype.
    """
    for name, tensor in _tensors(model):
        rounded = tensor.data.to(dtypes[name])
        if bool((rounded.isinf() & tensor.isfinite()).any()):
            shown = str(rounded.dtype).removeprefix("torch.")
            raise ValueError(f"dtype={shown!r} is too small for values of {name}: pass 'bfloat16' or 'float32'.")
        tensor.data = rounded


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, shared ones under all their names, and buffers."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers()


def rotate_model(
    model: PreTrainedModel,
    ids: Tensor,
    pattern: SparsityPattern,
    steps: int,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> tuple[float, float]:
    """Train a rotation on token ids [sequences, length], and rotate a float32 model in place.

    Returns:
        `error_ratio` and `difference` of `RotationReport`.

    Raises:
        ValueError: If the pattern does not fit an operator, or an operator fits it already.
        UnsupportedArchitectureError: If the model then returns something else.
    """
    (batch,) = read_batches([ids], input_embedding(model).shape[0])
    stream = find_residual_stream(model, ids[:1])
    for operator in (*(reader for norm in stream.norms for reader in norm.readers), *stream.writers):
        if operator.name in stream.pruned:
            pattern.require_shape(operator.shape, operator.name)
            weight = operator.read()
            if bool(weight.any()) and not bool(weight[~pattern.mask(weight.square())].any()):
                raise ValueError(
                    f"{operator.name} has the zeros of pattern={pattern.text!r} already: a rotation fills them. Pass a "
                    "dense model."
                )
    expected = _logits(model, ids)
    stream.move_gains()
    # a rotation of no use, there and back, so that a model that can't be rotated is refused before all the work
    trial = random_rotation(stream.size, seed, stream.keeps_mean)
    stream.rotate(trial)
    _require_same(model, ids, expected)
    stream.rotate(trial.T)
    groups = stream.measure(DenseLoss(model, stream.layers, [batch], ids.numel(), progress))
    with tqdm(total=steps, desc="Training the rotation", unit="step", disable=not progress) as bar:

        def show(error: float) -> None:
            bar.set_postfix_str(f"predicted error {error:.3f}")
            bar.update()

        with quick_products():
            rotation, ratio = train_rotation(
                groups,
                pattern,
                steps=steps,
                learning_rate=learning_rate,
                seed=seed,
                keeps_mean=stream.keeps_mean,
                progress=show,
            )
    stream.rotate(rotation)
    return ratio, _require_same(model, ids, expected)


def _require_same(model: PreTrainedModel, ids: Tensor, expected: Tensor) -> float:
    """Refuse a model that returns other logits than before; returns their relative difference.

    Raises:
        UnsupportedArchitectureError: If rounding doesn't explain it.
    """
    found = _logits(model, ids)
    sizes = expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    differences = (found - expected).norm(dim=-1) / sizes
    # rounding may send a few tokens to other experts
    beyond = float(differences.quantile(0.9 if any(map(is_fused_experts, model.modules())) else 1.0))
    if not beyond <= _ROUNDING:
        raise unsupported(model, f"its logits then differ by {beyond:.1e}, more than rounding explains")
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the first sequence, float32, on the CPU."""
    return model(input_ids=ids[:1].to(model.device), use_cache=False).logits.float().cpu()


def _require_options(
    pattern: str,
    sparsity: float | None,
    tokens: int,
    sequence_length: int | None,
    steps: int,
    learning_rate: float,
    seed: int,
    compute_dtype: str,
) -> SparsityPattern:
    """Refuse options out of range; returns the pattern."""
    aim = parse_pattern(pattern, sparsity)
    if isinstance(aim, WholeParts) or not aim.sparsity:
        raise ValueError(f"pattern={pattern!r}, sparsity={sparsity!r}: pass a pattern of zeros, such as '2:4'.")
    for name, value, least in (("tokens", tokens, 1), ("sequence_length", sequence_length, 2), ("steps", steps, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: pass {least} or more.")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate}: pass a positive number.")
    if compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype={compute_dtype!r}: pass {', '.join(COMPUTE_DTYPES)}.")
    require_seed(seed)
    return aim
