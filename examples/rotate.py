"""Rotate a dense model: it gives the same outputs, but pruning it to a pattern n:m costs less.

What writes to the residual stream is multiplied by an orthogonal matrix `Q`, and what reads it by the inverse. If
values have a projection of their own, each key-value head has a matrix `R` between them and the output projection. All
products are taken once, in the weights (SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456). The matrices are trained
to make the predicted error of the pattern small. DenoiseRotator (arXiv 2505.23049) has the same aim, but trains on an
entropy.

The model needs RMSNorm right before its attention, its MLP and its head, and no mixtures of experts. Models that would
give other outputs are refused. The model is kept in memory in float32. If the head shares the weights of the embedding,
it gets weights of its own.

python examples/rotate.py --model MODEL --output rotated --calibration texts.txt
optimum-fista prune rotated --output rotated-24 --pattern 2:4 --reorder-channels --calibration texts.txt
"""

import argparse
import itertools
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_fista import calibration_tokens, load_model
from optimum_fista.atomic import errors_of_writing
from optimum_fista.devices import floating_dtype, usable_device
from optimum_fista.environment import numerical_environment
from optimum_fista.folder.checkpoint import CARD_FILE, CONFIG_KEY
from optimum_fista.folder.output import new_output, require_output
from optimum_fista.model import UnsupportedArchitectureError
from optimum_fista.model.calibration import read_batches
from optimum_fista.model.experts import is_fused_experts
from optimum_fista.model.hooks import evaluation_mode, watching
from optimum_fista.model.layers import find_decoder_layers, token_limits
from optimum_fista.model.media import media_arguments
from optimum_fista.model.operators import LINEAR, LinearOperator
from optimum_fista.model.precision import is_fast
from optimum_fista.public_names import public_name
from optimum_fista.removal.parts import ModelOutline
from optimum_fista.solve.linalg import damped_inverse, diagonal_blocks
from optimum_fista.solve.pattern import SparsityPattern, parse_pattern
from optimum_fista.source.files import copy_source, source_folder
from optimum_fista.source.loading import gguf_file
from optimum_fista.source.sorting import source_tensors

_DAMPING = 0.01  # of a Gram matrix, in means of its diagonal
_LAYERS, _SHARE = (
    10,
    0.3,
)  # what a step looks at: decoder layers, and of each this share of its rows or columns
_BETAS = 0.9, 0.95  # of Adam
_RATE, _RATE_OF_HEADS, _WARM_UP = (
    5e-3,
    4e-2,
    10,
)  # a head is looked at in fewer steps, so it turns further in each
_ROUNDING = (
    1e-3  # of the logits of a token, relative; that of 30 decoder layers in float32 comes to 1e-5
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or model folder"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("rotated"), help="folder to write the dense model to"
    )
    parser.add_argument(
        "--pattern", default="2:4", help="the pattern n:m that it will be pruned to"
    )
    parser.add_argument(
        "--calibration", default="self", help="text to calibrate on: .txt, .jsonl, c4, self, ..."
    )
    parser.add_argument("--num-samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens in each sequence")
    parser.add_argument("--steps", type=int, default=500, help="steps of the training")
    parser.add_argument(
        "--seed", type=int, default=0, help="chooses the text, and the weights that each step uses"
    )
    parser.add_argument(
        "--device", help="cpu, cuda, ... (default: the accelerator if there is one)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="dtype to save in (default: as Transformers loads it)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that --output already holds"
    )
    try:
        found = rotate(**vars(parser.parse_args()))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing is written") from None
    print(
        "the predicted error of {pattern} is {error_ratio:.3f} times that before ({seconds:.0f} s)".format(
            **found
        )
    )
    print(
        "in float32 the logits differ by {difference:.1e}; {growth:+.1%} parameters; {heads} heads".format(
            **found
        )
    )


@numerical_environment()
def rotate(
    model: str,
    output: Path,
    pattern: str,
    calibration: str,
    num_samples: int,
    sequence_length: int,
    steps: int,
    seed: int,
    device: str | None,
    dtype: str,
    overwrite: bool,
) -> dict[str, Any]:
    """Save a rotated model, and return what `config.json` says of it; the arguments are those of the command.

    The gains of the norms are multiplied into the weights that follow. One number for each norm stays, so that the
    weights keep their size, and learning rates still suit. Products are taken in float64 and kept in float32.

    Raises:
        ValueError: If an option can't be used, the model is pruned, its class does not load all of its tensors, or no
            rotation with a smaller error was found.
        UnsupportedArchitectureError: If the model would give other outputs (a ValueError).
        FileExistsError: If `output` holds a model and `overwrite` is False, or files of the user.
    """
    started, aim, place = time.perf_counter(), parse_pattern(pattern, None), usable_device(device)
    if aim.span is None or aim.width > 1:
        raise ValueError(
            f"pattern={pattern!r}: a rotation is trained for n:m, pass a pattern such as '2:4'."
        )
    for name, value in {
        "num_samples": num_samples,
        "sequence_length": sequence_length - 1,
        "steps": steps,
    }.items():
        if value < 1:
            raise ValueError(
                f"{name} is too small: pass at least {2 if name == 'sequence_length' else 1}."
            )
    require_output(output, overwrite, source=model)
    target = None if dtype == "auto" else floating_dtype(dtype)
    dense, tokenizer = load_model(model, device=str(place))
    if getattr(dense.config, CONFIG_KEY, None):
        why = "is pruned, and a rotation would fill its zeros and lose its report"
        raise ValueError(f"model={model!r} {why}: rotate the dense model, then prune it.")
    source = (
        None
        if gguf_file(model)
        else source_folder(model, getattr(dense.config, "_commit_hash", None))
    )
    if source is not None and (others := source_tensors(dense, source).not_loaded):
        what = f"{min(others)}, which {type(dense).__name__} does not load and which can't be rotated with it"
        raise ValueError(
            f"model={model!r} has {what}: pass a folder without such tensors (model.save_pretrained)."
        )
    size, dtypes = dense.num_parameters(), {name: tensor.dtype for name, tensor in _tensors(dense)}
    with new_output(output, overwrite, source) as folder, evaluation_mode(dense):
        ids = calibration_tokens(calibration, dense, tokenizer, num_samples, sequence_length, seed)
        read_batches([ids], *token_limits(dense))  # refuses what the model can't read
        torch.nn.Module.float(dense)
        found: dict[str, Any] = {
            "model": public_name(model),
            "calibration": public_name(calibration),
        }
        found |= {"pattern": pattern, "num_tokens": ids.numel(), "steps": steps, "seed": seed}
        found |= rotate_model(dense, ids, aim, steps, seed)
        for name, tensor in _tensors(dense):
            tensor.data = tensor.data.to(
                target if target and tensor.is_floating_point() else dtypes[name]
            )
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"dtype={dtype!r} can't hold values of {name}: pass 'bfloat16' or 'float32'."
                )
        dense.config.dtype = dense.dtype
        found |= {
            "growth": dense.num_parameters() / size - 1,
            "seconds": time.perf_counter() - started,
        }
        dense.config.fista_rotation = found
        with errors_of_writing(folder):
            dense.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if source is not None:
                copy_source(source, folder)
                if (
                    card := source / CARD_FILE
                ).exists():  # its licence goes to the cards of pruned models
                    shutil.copyfile(card, folder / CARD_FILE)
    return found


def rotate_model(
    model: PreTrainedModel, ids: Tensor, pattern: SparsityPattern, steps: int, seed: int
) -> dict[str, float]:
    """Rotate a float32 model, by a rotation trained on tokens [sequences, length].

    Returns the predicted error after over that before (a geometric mean over the weights), the relative difference of
    the logits, and the number of heads that turned.
    """
    stream, expected, generator = (
        _Stream(model, ids[:1, :16], pattern),
        _logits(model, ids),
        torch.Generator(),
    )
    stream.move_gains()

    def change() -> float:  # by any rotation, there and back, before all the work
        trial = [
            torch.randn(turn.value.shape, generator=generator.manual_seed(seed))
            for turn in stream.turns()
        ]
        trial = [torch.linalg.qr(values.double())[0].to(model.device) for values in trial]
        stream.rotate(trial)
        found = _difference(_logits(model, ids), expected)
        stream.rotate([turn.mT for turn in trial])
        return found

    if not (found := change()) <= _ROUNDING and any(layer.value for layer in stream.layers):
        for layer in stream.layers:  # something else is between values and output, such as a gate
            layer.value, layer.output, layer.heads = None, None, (0, 1, 1)
        found = change()
    if found <= _ROUNDING:
        stream.measure(ids)
        turns, ratio = _train(stream, pattern, steps, generator)
        if not ratio < 1:
            raise ValueError(
                f"no rotation with a smaller error of {pattern} was found: prune the model as it is."
            )
        stream.rotate(turns)
        found = _difference(after := _logits(model, ids), expected)
    if not found <= _ROUNDING:
        raise _unsupported(model, f"its outputs would change (relative difference {found:.1e})")
    difference = float((after - expected).norm() / expected.norm())
    return {
        "error_ratio": ratio,
        "difference": difference,
        "heads": sum(layer.heads[0] for layer in stream.layers),
    }


@dataclass(eq=False)
class _Layer:
    """What a decoder layer reads from the residual stream and adds to it, and sums over the calibration tokens."""

    readers: dict[nn.Module, list[LinearOperator]] = field(
        default_factory=dict
    )  # by the norm before them
    writers: list[LinearOperator] = field(default_factory=list)
    # The projection to values, the one that reads the attended values, and the numbers of key-value heads, of query
    # heads for each, and of inputs of a head. Without heads that can turn there are none.
    value: LinearOperator | None = None
    output: LinearOperator | None = None
    heads: tuple[int, int, int] = (0, 1, 1)
    inverses: dict[nn.Module, Tensor] = field(
        default_factory=dict
    )  # of damped Gram matrices, by norm
    blocks: Tensor | None = (
        None  # of that of `output`, [key-value heads, query heads, width, width]
    )
    squares: dict[LinearOperator, Tensor] = field(
        default_factory=dict
    )  # mean squares of inputs, by writer

    def errors(
        self,
        rotation: Tensor,
        turn: Tensor,
        pattern: SparsityPattern,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """For each operator its number of weights, and the error that the pattern is predicted to cause, a scalar.

        Removing one weight costs `w_ij^2 / [H^-1]_jj` (optimal brain surgeon), or `w_ij^2 E[x_j^2]` behind the MLP,
        whose large Gram matrix is not kept. With a `generator`, random rows or columns stand for all. Of inputs that
        are turned, every (number / m)-th is of one group, which is faster than side by side (`_side_by_side`).
        """
        span = pattern.span or 1
        for norm, operators in self.readers.items():
            sizes = (rotation * (self.inverses[norm] @ rotation)).sum(0)  # [hidden]
            for operator in operators:
                weight = _matrix(operator)
                if operator is self.value:
                    weight = (turn.mT @ weight.unflatten(0, (len(turn), -1))).flatten(0, 1)
                elif generator is not None:
                    weight = weight[_some(len(weight), generator).to(weight.device)]
                scores = (weight @ rotation).float().square() / sizes
                yield operator.parameter.numel(), _lost(scores.unflatten(1, (span, -1)), pattern)
        for operator in self.writers:
            weight = _matrix(operator)
            if operator is self.output and self.blocks is not None:
                sizes = (turn[:, None] * (self.blocks @ turn[:, None])).sum(
                    -2
                )  # [key-value heads, query heads, width]
                weight = torch.einsum("okgi,kij->okgj", weight.unflatten(1, self.heads), turn)
                scores = (rotation.T @ weight.flatten(1)).float().view_as(weight).square() / sizes
                yield operator.parameter.numel(), _lost(scores.unflatten(-1, (span, -1)), pattern)
                continue
            weight = weight.unflatten(1, (-1, span)).mT  # [hidden, m, groups]
            squares = self.squares[operator].unflatten(0, (-1, span)).mT
            if generator is not None:
                chosen = _some(weight.shape[2], generator).to(weight.device)
                weight, squares = weight[..., chosen], squares[:, chosen]
            scores = (rotation.T @ weight.flatten(1)).float().view_as(weight).square() * squares
            yield operator.parameter.numel(), _lost(scores, pattern)


class _Stream:
    """The residual stream of a model, in its decoder layers and around them."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, pattern: SparsityPattern) -> None:
        """Find it by a run on a few tokens: an operator reads the stream if its input is the output of a norm."""
        found, self.model = find_decoder_layers(model), model
        self.size: int = cast(Tensor, model.get_input_embeddings().weight).shape[1]
        reasons: dict[str, Any] = {"its layers share weights": found.shared}
        reasons["it takes images or sounds"] = media_arguments(model).names
        reasons["it is a mixture of experts"] = any(map(is_fused_experts, model.modules()))
        for why in (why for why, holds in reasons.items() if holds):
            raise _unsupported(model, why)
        head, self.layers = model.get_output_embeddings(), [_Layer() for _ in found]
        self.norms = dict[nn.Module, list[LinearOperator]]()  # all readers, the head too
        operators = {head: (LinearOperator("head", head), _Layer())}
        for own, (prefix, whole) in zip(self.layers, found, strict=True):
            linear = [
                (name, m) for name, m in whole.named_modules(prefix=prefix) if isinstance(m, LINEAR)
            ]
            operators |= {m: (LinearOperator(name, m), own) for name, m in linear}
        outputs, inputs = dict[int, tuple[nn.Module, Tensor]](), dict[nn.Module, Tensor]()

        def see(module: nn.Module, _: Any, output: Tensor) -> None:
            outputs[output.data_ptr()] = (
                module,
                output,
            )  # kept, so that no other tensor gets its place in memory

        alone = [
            m for m in model.modules() if [name for name, _ in m.named_parameters()] == ["weight"]
        ]
        norms = {m: see for m in alone if m.weight.shape == (self.size,)}
        calls = {m: partial(inputs.__setitem__, m) for m in operators}
        with watching(calls, norms), torch.no_grad():
            model(input_ids=ids.to(model.device), use_cache=False)
        for module, (operator, layer) in operators.items():
            if module not in inputs:
                raise _unsupported(model, f"a run on text does not call {operator.name}")
            norm = outputs.get(inputs[module].data_ptr(), (None,))[0]
            if norm is not None:
                layer.readers.setdefault(norm, []).append(operator)
                self.norms.setdefault(norm, []).append(operator)
            elif module is head:
                raise _unsupported(model, "its head does not directly follow an RMSNorm")
            elif operator.shape[0] == self.size:
                layer.writers.append(operator)
            if operator.name != "head":
                pattern.require_shape(operator.shape, operator.name)
        names = {operator.name: (operator, layer) for operator, layer in operators.values()}
        with suppress(UnsupportedArchitectureError):  # then no heads are turned
            for part in ModelOutline(found).parts("heads").parts:
                values = [
                    name
                    for tensor in part.tensors
                    if (name := tensor.removesuffix(".weight")).endswith("v_proj")
                ]
                (output, layer), value = names[part.name], names[values[0]][0] if values else None
                width = value.shape[0] // part.groups if value else 0
                if (
                    width
                    and not (width % (pattern.span or 1) or part.width % width)
                    and output in layer.writers
                ):
                    layer.value, layer.output, layer.heads = (
                        value,
                        output,
                        (part.groups, part.width // width, width),
                    )

    def turns(self) -> list["_Turn"]:
        """No rotation: the matrix of the stream [1, hidden, hidden], and those of the heads of each decoder layer."""
        sizes = [(1, self.size), *((layer.heads[0], layer.heads[2]) for layer in self.layers)]
        return [
            _Turn(torch.eye(size, device=self.model.device).repeat(count, 1, 1))
            for count, size in sizes
        ]

    @torch.no_grad()
    def move_gains(self) -> None:
        """Move the gains of norms into the operators behind them, except for a number; the head gets its own weight."""
        head, embedding = cast(
            Any, (self.model.get_output_embeddings(), self.model.get_input_embeddings())
        )
        if head.weight is embedding.weight:
            head.weight = nn.Parameter(
                embedding.weight.detach().clone(), embedding.weight.requires_grad
            )
        for config in (self.model.config, self.model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
        self.model.all_tied_weights_keys = self.model.get_expanded_tied_weights_keys(
            all_submodels=True
        )
        for norm, readers in self.norms.items():
            scale: Any = norm.weight
            shift = (
                (norm(torch.ones_like(scale)) - scale).mean().round()
            )  # 1 if it multiplies by 1 + weight
            gain, dense = scale.double() + shift, [reader.read().double() for reader in readers]
            new = [weight * gain for weight in dense]
            mean = (
                torch.cat(new).norm() / torch.cat(dense).norm()
            )  # so that the weights keep their size
            mean = torch.where(mean.isfinite() & (mean > 0), mean, 1.0)  # all of them are zero
            for reader, weight in zip(readers, new, strict=True):
                reader.write(weight / mean)
            scale.fill_(mean - shift)

    @torch.no_grad()
    def rotate(self, turns: Sequence[Tensor]) -> None:
        """Have the stream hold `Q^T x` instead of `x`, and the heads `R^T v` instead of `v`; matrices in float64."""
        (rotation,), embedding = turns[0], cast(Tensor, self.model.get_input_embeddings().weight)
        embedding.copy_(embedding.double() @ rotation)
        for layer, turn in zip(self.layers, turns[1:], strict=True):
            if layer.value is not None and layer.output is not None:
                for tensor in (layer.value.module.weight, layer.value.module.bias):
                    if isinstance(tensor, Tensor):
                        rows = tensor.double().view(len(turn), turn.shape[1], -1)
                        tensor.copy_((turn.mT @ rows).view_as(tensor))
                weight = layer.output.read().double().unflatten(1, layer.heads)
                layer.output.write(torch.einsum("okgi,kij->okgj", weight, turn).flatten(1))
            for writer in layer.writers:
                writer.write(rotation.T @ writer.read().double())
                bias = writer.module.bias
                if isinstance(bias, Tensor):
                    bias.copy_(bias.double() @ rotation)
        for reader in (reader for readers in self.norms.values() for reader in readers):
            reader.write(reader.read().double() @ rotation)

    def measure(self, ids: Tensor) -> None:
        """Run the model on the calibration tokens, and sum over the inputs of its operators."""
        sums, calls = dict[nn.Module, Tensor](), dict[nn.Module, Any]()

        def add(key: nn.Module, square: bool, inputs: Tensor) -> None:
            rows = inputs.flatten(0, -2).float()
            with torch.autocast(rows.device.type, enabled=False):
                sums[key] = sums.get(key, 0) + (rows.T @ rows if square else rows.square().sum(0))

        for layer in self.layers:
            calls |= {
                readers[0].module: partial(add, norm, True)
                for norm, readers in layer.readers.items()
            }
            calls |= {w.module: partial(add, w.module, w is layer.output) for w in layer.writers}
        with watching(calls), torch.no_grad(), _quickly(self.model.device):
            for row in tqdm(ids, desc="Measuring inputs", unit="sequence"):
                self.model(input_ids=row[None].to(self.model.device), use_cache=False)

        def inverse(gram: Tensor) -> Tensor:
            return damped_inverse(gram, _DAMPING * float(gram.diagonal().mean()) or 1.0)

        for layer in self.layers:
            layer.inverses = {norm: inverse(sums.pop(norm)) for norm in layer.readers}
            for writer in layer.writers:
                found = sums.pop(writer.module)
                if writer is layer.output:
                    layer.blocks = diagonal_blocks(inverse(found), layer.heads[2]).unflatten(
                        0, layer.heads[:2]
                    )
                else:
                    layer.squares[writer] = found


class _Turn:
    """Orthogonal matrices [number, n, n], moved by Adam in the tangent space (skew-symmetric matrices)."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.mean, self.square, self.count = (
            value,
            torch.zeros_like(value),
            torch.zeros_like(value),
            0,
        )

    def step(self, gradient: Tensor, rate: float) -> None:
        """Move against a gradient: `Q exp(-rate A)`, with `A` from the skew-symmetric part of `Q^T gradient`."""
        slope = self.value.mT @ gradient
        slope = slope - slope.mT
        self.count += 1
        self.mean.lerp_(slope, 1 - _BETAS[0])
        self.square.lerp_(slope.square(), 1 - _BETAS[1])
        root = (self.square / (1 - _BETAS[1] ** self.count)).sqrt_().add_(1e-30)
        skew = self.mean / (1 - _BETAS[0] ** self.count) / root
        self.value = self.value @ torch.matrix_exp(skew.mul_(-rate))


def _train(
    stream: _Stream, pattern: SparsityPattern, steps: int, generator: torch.Generator
) -> tuple[list[Tensor], float]:
    """Train the matrices, so that the geometric mean of the predicted errors gets small, by operator.

    Returns them in float64, with inputs of a group side by side, and the mean after over that before.
    """
    turns, layers, waiting, device = stream.turns(), stream.layers, list[int](), stream.model.device
    for turn in turns:
        turn.value = turn.value[..., _side_by_side(turn.value, pattern).argsort()]

    @torch.no_grad()
    def mean_log() -> float:
        pairs = zip(layers, turns[1:], strict=True)
        with _quickly(device):
            found = [
                e
                for layer, turn in pairs
                for e in layer.errors(turns[0].value[0], turn.value, pattern)
            ]
        return sum(count * float(_log(error)) for count, error in found) / sum(
            count for count, _ in found
        )

    before = mean_log()
    for step in tqdm(range(steps), desc="Training the rotation", unit="step"):
        share = min(1, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
        if len(waiting) < min(_LAYERS, len(layers)):
            waiting = torch.randperm(len(layers), generator=generator).tolist()
        drawn, waiting = waiting[:_LAYERS], waiting[_LAYERS:]
        rotation = turns[0].value.clone().requires_grad_()
        for number in drawn:
            own = turns[1 + number].value.clone().requires_grad_()
            with torch.enable_grad(), _quickly(device):
                errors = layers[number].errors(rotation[0], own, pattern, generator)
                torch.stack([count * _log(error) for count, error in errors]).sum().backward()
            if own.grad is not None:
                turns[1 + number].step(own.grad, share * _RATE_OF_HEADS)
        assert rotation.grad is not None
        turns[0].step(rotation.grad, share * _RATE)
    ratio = math.exp(mean_log() - before)
    found = []
    for turn in turns:
        u, _, v = torch.linalg.svd(turn.value.double())  # in float32 they are less orthogonal
        found.append((u @ v)[..., _side_by_side(turn.value, pattern)])
    return found, ratio


def _side_by_side(turns: Tensor, pattern: SparsityPattern) -> Tensor:
    """The order of columns in which the members of a group of the pattern are side by side."""
    count = turns.shape[-1]
    return (
        torch.arange(count, device=turns.device)
        .view((pattern.span or 1) if len(turns) else 1, -1)
        .T.flatten()
    )


def _quickly(device: torch.device) -> torch.autocast:
    """Inside, products are taken in bfloat16 where that is fast; weights are rotated in float64 elsewhere."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=is_fast(torch.bfloat16, device), cache_enabled=False
    )


def _log(error: Tensor) -> Tensor:
    return error.clamp_min(torch.finfo(torch.float32).tiny).log()


def _lost(scores: Tensor, pattern: SparsityPattern) -> Tensor:
    """The sum of the scores [.., m, groups] that go, a scalar."""
    members, larger = scores.detach().unbind(-2), torch.zeros_like(scores, dtype=torch.uint8)
    for i, j in itertools.combinations(range(len(members)), 2):
        loses = members[i] < members[j]
        larger[..., i, :] += loses
        larger[..., j, :] += ~loses
    gone = larger >= pattern.num_kept((1, len(members)))
    return (scores * gone).sum()


def _some(count: int, generator: torch.Generator) -> Tensor:
    """A random share of the numbers below `count`."""
    return torch.randperm(count, generator=generator)[: math.ceil(_SHARE * count)]


def _matrix(operator: LinearOperator) -> Tensor:
    """The weight [out, in] as it is stored, no copy."""
    return operator.parameter.detach().T if operator.transposed else operator.parameter.detach()


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers()


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the first sequence, on the CPU."""
    return model(input_ids=ids[:1].to(model.device), use_cache=False).logits[0].float().cpu()


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference of the logits of a token."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _unsupported(model: PreTrainedModel, why: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"{type(model).__name__} can't be rotated: {why}. Prune it as it is."
    )


if __name__ == "__main__":
    main()
