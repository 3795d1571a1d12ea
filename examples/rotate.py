"""Rotate a dense model: it gives the same outputs, but pruning it to a pattern n:m costs less.

What writes to the residual stream is multiplied by an orthogonal matrix `Q`, and what reads it by the inverse. If
values have a projection of their own, each key-value head has a matrix `R` between them and the output projection. All
products are taken once, in the weights (SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456). The matrices are trained
to make the predicted error of the pattern small. DenoiseRotator (arXiv 2505.23049) has the same aim, but trains on an
entropy.

The model needs RMSNorm right before its attention, its MLP and its head, and no mixtures of experts. Models that would
give other outputs are refused. The model is kept in memory in float32. If the head shares the weights of the embedding,
it gets weights of its own.

`rotate` is the whole command. It calls `rotate_model`, which

1. finds what reads and writes the residual stream (`_Stream`), by a run on a few tokens;
2. moves the gains of the norms into the weights after them, so that rotations pass through the norms;
3. checks with a random rotation that the outputs stay;
4. sums over the inputs of the operators on the calibration tokens (`_Stream.measure`);
5. trains the matrices (`_train`), and multiplies them into the weights (`_Stream.rotate`).

Words: an *operator* (`LinearOperator`) is a linear layer with a weight [out, in]. A *reader* is an operator whose input
is the output of a norm of the stream, a *writer* one whose output is added to the stream. To *turn* is to multiply by
an orthogonal matrix. In a pattern n:m, n inputs are kept of each *group* of m, the *span* of the pattern.

python examples/rotate.py --model MODEL --output rotated --calibration texts.txt
optimum-fista prune rotated --output rotated-24 --pattern 2:4 --reorder-channels --calibration texts.txt
"""

import argparse
import itertools
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

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
from optimum_fista.model.layers import DecoderLayers, find_decoder_layers, token_limits
from optimum_fista.model.media import media_arguments
from optimum_fista.model.operators import LINEAR, LinearOperator
from optimum_fista.model.precision import is_fast
from optimum_fista.public_names import public_name
from optimum_fista.removal.model_outline import ModelOutline
from optimum_fista.solve.linalg import damped_inverse, diagonal_blocks
from optimum_fista.solve.pattern import SparsityPattern, parse_pattern
from optimum_fista.source.files import copy_source, source_folder
from optimum_fista.source.inventory import source_tensors
from optimum_fista.source.loading import gguf_file

# Of a Gram matrix, in means of its diagonal.
_DAMPING = 0.01
# What a step of the training looks at: this many decoder layers, and of each this share of its rows or columns.
_LAYERS = 10
_SHARE = 0.3
# Of Adam: of the mean and of the mean square of the gradients.
_BETA_OF_MEAN = 0.9
_BETA_OF_SQUARE = 0.95
# Learning rates. A head is looked at in fewer steps, so it turns further in each.
_RATE = 5e-3
_RATE_OF_HEADS = 4e-2
# Steps in which the learning rates rise.
_WARM_UP = 10
# The largest relative error of the logits of a token by rounding; that of 30 decoder layers in float32 comes to 1e-5.
_ROUNDING = 1e-3
# Tokens of the run that finds readers and writers.
_FEW_TOKENS = 16


def main() -> None:
    """Read the command line, rotate the model, and print what came of it."""
    try:
        result = rotate(**vars(_parser().parse_args()))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing is written") from None
    print(
        f"the predicted error of {result['pattern']} is {result['error_ratio']:.3f} times that before "
        f"({result['seconds']:.0f} s)"
    )
    print(
        f"in float32 the logits differ by {result['difference']:.1e}; {result['growth']:+.1%} parameters; "
        f"{result['heads']} heads"
    )


def _parser() -> argparse.ArgumentParser:
    """Make the parser; the names of its flags are the parameters of `rotate`."""
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
    return parser


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
    weights keep their size, and learning rates still suit. Products are taken in float64 and kept in float32. `output`
    is written when the whole model is ready.

    Raises:
        ValueError: If an option can't be used, the model is pruned, its class does not load all of its tensors, or no
            rotation with a smaller error was found.
        UnsupportedArchitectureError: If the model would give other outputs (a ValueError).
        FileExistsError: If `output` holds a model and `overwrite` is False, or files of the user.
    """
    started = time.perf_counter()
    sparsity_pattern = parse_pattern(pattern, None)
    place = usable_device(device)
    if sparsity_pattern.span is None or sparsity_pattern.width > 1:
        raise ValueError(
            f"pattern={pattern!r}: a rotation is trained for n:m, pass a pattern such as '2:4'."
        )
    _require_numbers(num_samples, sequence_length, steps)
    require_output(output, overwrite, source=model)
    asked_dtype = None if dtype == "auto" else floating_dtype(dtype)

    dense, tokenizer = load_model(model, device=str(place))
    source = None  # the folder of the model's files; a GGUF file has none
    if not gguf_file(model):
        source = source_folder(model, getattr(dense.config, "_commit_hash", None))
    _require_whole_dense_model(model, dense, source)
    size = dense.num_parameters()
    dtypes = {name: tensor.dtype for name, tensor in _tensors(dense)}

    with new_output(output, overwrite, source) as folder, evaluation_mode(dense):
        ids = calibration_tokens(calibration, dense, tokenizer, num_samples, sequence_length, seed)
        read_batches([ids], *token_limits(dense))  # refuses what the model can't read
        torch.nn.Module.float(dense)
        measured = rotate_model(dense, ids, sparsity_pattern, steps, seed)
        for name, tensor in _tensors(dense):
            is_converted = asked_dtype is not None and tensor.is_floating_point()
            tensor.data = tensor.data.to(asked_dtype if is_converted else dtypes[name])
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"dtype={dtype!r} can't hold values of {name}: pass 'bfloat16' or 'float32'."
                )
        dense.config.dtype = dense.dtype
        result: dict[str, Any] = {
            "model": public_name(model),
            "calibration": public_name(calibration),
            "pattern": pattern,
            "num_tokens": ids.numel(),
            "steps": steps,
            "seed": seed,
            **measured,
            "growth": dense.num_parameters() / size - 1,
            "seconds": time.perf_counter() - started,
        }
        dense.config.fista_rotation = result

        with errors_of_writing(folder):
            dense.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if source is not None:
                copy_source(source, folder)
                card = source / CARD_FILE
                if card.exists():  # its licence goes to the cards of pruned models
                    shutil.copyfile(card, folder / CARD_FILE)
    return result


def _require_numbers(num_samples: int, sequence_length: int, steps: int) -> None:
    """Refuse numbers with which `rotate` can do nothing; ValueError."""
    if num_samples < 1:
        raise ValueError("num_samples is too small: pass at least 1.")
    if sequence_length < 2:
        raise ValueError("sequence_length is too small: pass at least 2.")
    if steps < 1:
        raise ValueError("steps is too small: pass at least 1.")


def _require_whole_dense_model(model: str, dense: PreTrainedModel, source: Path | None) -> None:
    """Refuse a model that is pruned, or whose files hold tensors that its class does not load; ValueError.

    `model` is its name, `dense` the loaded model, and `source` the folder of its files.
    """
    if getattr(dense.config, CONFIG_KEY, None):
        raise ValueError(
            f"model={model!r} is pruned, and a rotation would fill its zeros and lose its report: rotate the dense "
            "model, then prune it."
        )
    if source is None:
        return
    not_loaded = source_tensors(dense, source).not_loaded
    if not_loaded:
        raise ValueError(
            f"model={model!r} has {min(not_loaded)}, which {type(dense).__name__} does not load and which can't be "
            "rotated with it: pass a folder without such tensors (model.save_pretrained)."
        )


def rotate_model(
    model: PreTrainedModel, ids: Tensor, pattern: SparsityPattern, steps: int, seed: int
) -> dict[str, float]:
    """Rotate a float32 model in place, by a rotation trained on tokens [sequences, length].

    Returns:
        error_ratio: The predicted error after over that before (a geometric mean over the weights).
        difference: The relative difference of the logits.
        heads: The number of heads that turned.
    """
    stream = _Stream(model, ids[:1, :_FEW_TOKENS], pattern)
    expected = _logits(model, ids)
    generator = torch.Generator()
    stream.move_gains()

    # Before all the work, a random rotation shows whether the outputs stay.
    change = _change_by_random_rotation(stream, ids, expected, generator, seed)
    is_exact = change <= _ROUNDING
    if not is_exact and any(layer.value for layer in stream.layers):
        for layer in stream.layers:
            # Something else is between values and output, such as a gate: heads do not turn.
            layer.value = None
            layer.output = None
            layer.heads = _Heads()
        change = _change_by_random_rotation(stream, ids, expected, generator, seed)
        is_exact = change <= _ROUNDING
    if not is_exact:
        raise _changes_outputs(model, change)

    stream.measure(ids)
    turns, error_ratio = _train(stream, pattern, steps, generator)
    if not error_ratio < 1:
        raise ValueError(
            f"no rotation with a smaller error of {pattern} was found: prune the model as it is."
        )
    stream.rotate(turns)
    rotated = _logits(model, ids)
    change = _difference(rotated, expected)
    if not change <= _ROUNDING:
        raise _changes_outputs(model, change)
    return {
        "error_ratio": error_ratio,
        "difference": float((rotated - expected).norm() / expected.norm()),
        "heads": sum(layer.heads.groups for layer in stream.layers),
    }


def _change_by_random_rotation(
    stream: "_Stream", ids: Tensor, expected: Tensor, generator: torch.Generator, seed: int
) -> float:
    """Rotate the model at random and back; return how far its logits are from `expected` in between (`_difference`).

    `seed` is set in `generator` before each matrix is drawn. Rounding changes the weights a little.
    """
    trial = []
    for turn in stream.turns():
        values = torch.randn(turn.value.shape, generator=generator.manual_seed(seed))
        orthogonal, _ = torch.linalg.qr(values.double())
        trial.append(orthogonal.to(stream.model.device))
    stream.rotate(trial)
    change = _difference(_logits(stream.model, ids), expected)
    stream.rotate([turn.mT for turn in trial])
    return change


class _Heads(NamedTuple):
    """The heads of an attention that can turn: none by default."""

    groups: int = 0  # key-value heads
    queries: int = 1  # query heads for each of them
    width: int = 1  # inputs of a head


@dataclass(eq=False)
class _Layer:
    """What a decoder layer reads from the residual stream and adds to it, and sums over the calibration tokens."""

    # By the norm before them.
    readers: dict[nn.Module, list[LinearOperator]] = field(default_factory=dict)
    writers: list[LinearOperator] = field(default_factory=list)
    # The projection to values, and the one that reads the attended values; None: no head can turn.
    value: LinearOperator | None = None
    output: LinearOperator | None = None
    heads: _Heads = field(default_factory=_Heads)
    # Inverses of damped Gram matrices [hidden, hidden], by norm.
    inverses: dict[nn.Module, Tensor] = field(default_factory=dict)
    # Diagonal blocks of that of `output`, [key-value heads, query heads, width, width].
    blocks: Tensor | None = None
    # Mean squares of inputs, by writer.
    squares: dict[LinearOperator, Tensor] = field(default_factory=dict)

    def errors(
        self,
        rotation: Tensor,
        turn: Tensor,
        pattern: SparsityPattern,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield for each operator its number of weights, and the predicted error of the pattern, a scalar.

        Removing one weight costs `w_ij^2 / [H^-1]_jj` (optimal brain surgeon), or `w_ij^2 E[x_j^2]` after the MLP,
        whose large Gram matrix is not kept. Of inputs that are turned, every (number / m)-th is of one group, which is
        faster than side by side (`_side_by_side`).

        Args:
            rotation: `Q` [hidden, hidden] of the stream.
            turn: `R` of the key-value heads of this decoder layer, [key-value heads, width, width].
            pattern: n:m.
            generator: With it, random rows or columns stand for all.
        """
        for norm, operators in self.readers.items():
            costs = (rotation * (self.inverses[norm] @ rotation)).sum(0)  # [H^-1]_jj, [hidden]
            for operator in operators:
                weight = self._read_weight(operator, turn, generator)
                scores = (weight @ rotation).float().square() / costs
                groups = scores.unflatten(1, (pattern.span or 1, -1))
                yield operator.parameter.numel(), _lost(groups, pattern)
        for operator in self.writers:
            if operator is self.output and self.blocks is not None:
                groups = self._scores_of_heads(self.blocks, rotation, turn, pattern)
            else:
                groups = self._scores_of_writer(operator, rotation, pattern, generator)
            yield operator.parameter.numel(), _lost(groups, pattern)

    def _read_weight(
        self, operator: LinearOperator, turn: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Return the weight [rows, hidden] of a reader: turned if it projects to values, otherwise some of its rows."""
        weight = _matrix(operator)
        if operator is self.value:
            return (turn.mT @ weight.unflatten(0, (len(turn), -1))).flatten(0, 1)
        if generator is not None:
            return weight[_some(len(weight), generator).to(weight.device)]
        return weight

    def _scores_of_heads(
        self, blocks: Tensor, rotation: Tensor, turn: Tensor, pattern: SparsityPattern
    ) -> Tensor:
        """Return the cost of each weight of the output projection, [hidden, key-value heads, query heads, m, groups].

        `blocks` are those of the class, `rotation` is `Q`, and `turn` is `R`.
        """
        assert self.output is not None
        # [H^-1]_jj, [key-value heads, query heads, width]
        costs = (turn[:, None] * (blocks @ turn[:, None])).sum(-2)
        weight = _matrix(self.output).unflatten(1, self.heads)
        weight = torch.einsum("okgi,kij->okgj", weight, turn)
        scores = (rotation.T @ weight.flatten(1)).float().view_as(weight).square() / costs
        return scores.unflatten(-1, (pattern.span or 1, -1))

    def _scores_of_writer(
        self,
        operator: LinearOperator,
        rotation: Tensor,
        pattern: SparsityPattern,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Return the cost of each weight of a writer whose inputs do not turn, [hidden, m, groups].

        `rotation` is `Q`. With a `generator`, random groups stand for all.
        """
        # Groups of its inputs are side by side.
        weight = _matrix(operator).unflatten(1, (-1, pattern.span or 1)).mT
        squares = self.squares[operator].unflatten(0, (-1, pattern.span or 1)).mT
        if generator is not None:
            chosen = _some(weight.shape[2], generator).to(weight.device)
            weight = weight[..., chosen]
            squares = squares[:, chosen]
        return (rotation.T @ weight.flatten(1)).float().view_as(weight).square() * squares


class _Stream:
    """The residual stream of a model, in its decoder layers and around them.

    Attributes:
        model: The model, which is rotated in place.
        size: The number of features of the stream, called hidden in shapes.
        layers: What each decoder layer reads and writes.
        norms: All readers by the norm before them, the head too.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, pattern: SparsityPattern) -> None:
        """Find readers and writers by a run on a few tokens, `ids` [1, tokens].

        An operator reads the stream if its input is the output of a norm. UnsupportedArchitectureError if the model
        can't be rotated.
        """
        decoder_layers = find_decoder_layers(model)
        _require_rotatable(model, decoder_layers)
        self.model = model
        self.size: int = cast(Tensor, model.get_input_embeddings().weight).shape[1]
        self.layers = [_Layer() for _ in decoder_layers]
        self.norms: dict[nn.Module, list[LinearOperator]] = {}

        head = model.get_output_embeddings()
        # The linear modules, each as an operator, with what its decoder layer reads and writes.
        operators = {head: (LinearOperator("head", head), _Layer())}
        for layer, (prefix, module) in zip(self.layers, decoder_layers, strict=True):
            for name, inner in module.named_modules(prefix=prefix):
                if isinstance(inner, LINEAR):
                    operators[inner] = (LinearOperator(name, inner), layer)

        norms_before = self._norms_before(operators, ids)
        for module, (operator, layer) in operators.items():
            if module not in norms_before:
                raise _unsupported(model, f"a run on text does not call {operator.name}")
            norm = norms_before[module]
            if norm is not None:
                layer.readers.setdefault(norm, []).append(operator)
                self.norms.setdefault(norm, []).append(operator)
            elif module is head:
                raise _unsupported(model, "its head does not directly follow an RMSNorm")
            elif operator.shape[0] == self.size:
                layer.writers.append(operator)
            if module is not head:
                pattern.require_shape(operator.shape, operator.name)

        by_name = {operator.name: (operator, layer) for operator, layer in operators.values()}
        with suppress(UnsupportedArchitectureError):  # then no heads are turned
            _find_heads(ModelOutline(decoder_layers), by_name, pattern)

    def _norms_before(
        self, modules: Iterable[nn.Module], ids: Tensor
    ) -> dict[nn.Module, nn.Module | None]:
        """Run the model on `ids`, and return for each module the norm whose output is its input; `None` if none is.

        Modules that did not run are left out. Hooks are on the modules while the model runs.
        """
        # By the address of its output. The output is kept, so that no other tensor gets its place in memory.
        outputs: dict[int, tuple[nn.Module, Tensor]] = {}
        inputs: dict[nn.Module, Tensor] = {}

        def keep_output(module: nn.Module, _: Any, output: Tensor) -> None:
            """Note the output of a norm, as its forward hook."""
            outputs[output.data_ptr()] = (module, output)

        norms: dict[nn.Module, Any] = {}
        for module in self.model.modules():
            names = [name for name, _ in module.named_parameters()]
            if names == ["weight"] and module.weight.shape == (self.size,):
                norms[module] = keep_output
        calls = {module: partial(inputs.__setitem__, module) for module in modules}
        with watching(calls, norms), torch.no_grad():
            self.model(input_ids=ids.to(self.model.device), use_cache=False)

        norms_before: dict[nn.Module, nn.Module | None] = {}
        for module, module_input in inputs.items():
            norm, _ = outputs.get(module_input.data_ptr(), (None, None))
            norms_before[module] = norm
        return norms_before

    def turns(self) -> list["_Turn"]:
        """Make no rotation yet: the matrix of the stream [1, hidden, hidden], and those of the heads of each layer."""
        sizes = [(1, self.size)]
        sizes += [(layer.heads.groups, layer.heads.width) for layer in self.layers]
        return [
            _Turn(torch.eye(size, device=self.model.device).repeat(count, 1, 1))
            for count, size in sizes
        ]

    @torch.no_grad()
    def move_gains(self) -> None:
        """Move the gains of norms into the operators after them, except for a number; the head gets its own weight.

        Changes the model: these weights, and its configuration, which no longer ties the head to the embedding.
        """
        head: Any = self.model.get_output_embeddings()
        embedding: Any = self.model.get_input_embeddings()
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
            # 1 if the norm multiplies by 1 + weight, as in Gemma.
            shift = (norm(torch.ones_like(scale)) - scale).mean().round()
            gain = scale.double() + shift
            dense = [reader.read().double() for reader in readers]
            scaled = [weight * gain for weight in dense]
            # One number stays in the norm, so that the weights keep their size.
            mean = torch.cat(scaled).norm() / torch.cat(dense).norm()
            is_positive = mean.isfinite() & (mean > 0)  # otherwise all weights are zero
            mean = torch.where(is_positive, mean, 1.0)
            for reader, weight in zip(readers, scaled, strict=True):
                reader.write(weight / mean)
            scale.fill_(mean - shift)

    @torch.no_grad()
    def rotate(self, turns: Sequence[Tensor]) -> None:
        """Have the stream hold `Q^T x` instead of `x`, and the heads `R^T v` instead of `v`; changes the weights.

        `turns` are float64: `Q` [1, hidden, hidden], and for each decoder layer `R` [key-value heads, width, width].
        """
        (rotation,) = turns[0]
        embedding = cast(Tensor, self.model.get_input_embeddings().weight)
        embedding.copy_(embedding.double() @ rotation)
        for layer, turn in zip(self.layers, turns[1:], strict=True):
            if layer.value is not None and layer.output is not None:
                # R^T into the rows that make values, and R into the columns that read them.
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
        for readers in self.norms.values():
            for reader in readers:
                reader.write(reader.read().double() @ rotation)

    def measure(self, ids: Tensor) -> None:
        """Run the model on the calibration tokens, and set `inverses`, `blocks` and `squares` of all layers.

        `ids` are int64 [sequences, length]. Hooks are on the modules while the model runs.
        """
        grams: dict[nn.Module, Tensor] = {}  # sums of x x^T, by norm and by output projection
        squares: dict[nn.Module, Tensor] = {}  # sums of the squares of x, by other writers

        def add_gram(key: nn.Module, inputs: Tensor) -> None:
            """Add the inputs of an operator to its Gram matrix, [in, in]."""
            rows = inputs.flatten(0, -2).float()
            with torch.autocast(rows.device.type, enabled=False):
                grams[key] = grams.get(key, 0) + rows.T @ rows

        def add_squares(key: nn.Module, inputs: Tensor) -> None:
            """Add the squares of the inputs of an operator to their sums, [in]."""
            rows = inputs.flatten(0, -2).float()
            with torch.autocast(rows.device.type, enabled=False):
                squares[key] = squares.get(key, 0) + rows.square().sum(0)

        calls: dict[nn.Module, Any] = {}
        for layer in self.layers:
            for norm, readers in layer.readers.items():
                calls[readers[0].module] = partial(add_gram, norm)
            for writer in layer.writers:
                add = add_gram if writer is layer.output else add_squares
                calls[writer.module] = partial(add, writer.module)
        with watching(calls), torch.no_grad(), _quickly(self.model.device):
            for row in tqdm(ids, desc="Measuring inputs", unit="sequence"):
                self.model(input_ids=row[None].to(self.model.device), use_cache=False)

        for layer in self.layers:
            layer.inverses = {norm: _damped(grams.pop(norm)) for norm in layer.readers}
            for writer in layer.writers:
                if writer is layer.output:
                    inverse = _damped(grams.pop(writer.module))
                    blocks = diagonal_blocks(inverse, layer.heads.width)
                    layer.blocks = blocks.unflatten(0, (layer.heads.groups, layer.heads.queries))
                else:
                    layer.squares[writer] = squares.pop(writer.module)


def _require_rotatable(model: PreTrainedModel, decoder_layers: DecoderLayers) -> None:
    """Refuse families whose outputs a rotation would change; UnsupportedArchitectureError."""
    if decoder_layers.shared:
        raise _unsupported(model, "its layers share weights")
    if media_arguments(model).names:
        raise _unsupported(model, "it takes images or sounds")
    if any(is_fused_experts(module) for module in model.modules()):
        raise _unsupported(model, "it is a mixture of experts")


def _find_heads(
    outline: ModelOutline,
    operators: Mapping[str, tuple[LinearOperator, _Layer]],
    pattern: SparsityPattern,
) -> None:
    """Set `value`, `output` and `heads` of the layers whose key-value heads can turn.

    `outline` finds the heads of attentions, and `operators` has each operator by name, with its layer.
    """
    for part in outline.parts("heads").parts:  # an attention, named by its output projection
        output, layer = operators[part.name]
        names = [tensor.removesuffix(".weight") for tensor in part.tensors]
        names_of_values = [name for name in names if name.endswith("v_proj")]
        if not names_of_values:
            continue
        value, _ = operators[names_of_values[0]]
        width = value.shape[0] // part.groups
        if not width or output not in layer.writers:
            continue
        # `part.width` is the number of inputs of all query heads of a key-value head.
        fits_pattern = width % (pattern.span or 1) == 0 and part.width % width == 0
        if fits_pattern:
            layer.value = value
            layer.output = output
            layer.heads = _Heads(part.groups, part.width // width, width)


class _Turn:
    """Orthogonal matrices [number, n, n], moved by Adam in the tangent space (skew-symmetric matrices)."""

    def __init__(self, value: Tensor) -> None:
        """Begin with the matrices `value`, without a mean of gradients."""
        self.value = value
        self.mean = torch.zeros_like(value)
        self.square = torch.zeros_like(value)
        self.count = 0  # of steps

    def step(self, gradient: Tensor, rate: float) -> None:
        """Move against a gradient: `Q exp(-rate A)`, with `A` from the skew-symmetric part of `Q^T gradient`."""
        slope = self.value.mT @ gradient
        slope = slope - slope.mT
        self.count += 1
        self.mean.lerp_(slope, 1 - _BETA_OF_MEAN)
        self.square.lerp_(slope.square(), 1 - _BETA_OF_SQUARE)
        # Both means begin at zero, which Adam corrects for.
        root = (self.square / (1 - _BETA_OF_SQUARE**self.count)).sqrt_().add_(1e-30)
        skew = self.mean / (1 - _BETA_OF_MEAN**self.count) / root
        self.value = self.value @ torch.matrix_exp(skew.mul_(-rate))


def _train(
    stream: _Stream, pattern: SparsityPattern, steps: int, generator: torch.Generator
) -> tuple[list[Tensor], float]:
    """Train the matrices, so that the geometric mean of the predicted errors gets small, by operator.

    `stream` has been measured, and stays as it is; `generator` draws decoder layers, rows and columns.

    Returns:
        The matrices in float64, with inputs of a group side by side.
        The mean after over that before.
    """
    turns = stream.turns()
    for turn in turns:
        turn.value = turn.value[..., _side_by_side(turn.value, pattern).argsort()]
    before = _mean_log_error(stream, turns, pattern)

    waiting: list[int] = []  # decoder layers of which no step of this round has been taken
    for step in tqdm(range(steps), desc="Training the rotation", unit="step"):
        if len(waiting) < min(_LAYERS, len(stream.layers)):
            waiting = torch.randperm(len(stream.layers), generator=generator).tolist()
        drawn = waiting[:_LAYERS]
        waiting = waiting[_LAYERS:]
        # The learning rate rises in the first steps, and falls to zero along a cosine.
        warm_up = min(1, (step + 1) / _WARM_UP)
        share_of_rate = warm_up * (1 + math.cos(math.pi * step / steps)) / 2
        _take_step(stream, turns, pattern, drawn, share_of_rate, generator)
    ratio = math.exp(_mean_log_error(stream, turns, pattern) - before)

    matrices = []
    for turn in turns:
        # The nearest orthogonal matrix: in float32 they are less orthogonal.
        u, _, v = torch.linalg.svd(turn.value.double())
        matrices.append((u @ v)[..., _side_by_side(turn.value, pattern)])
    return matrices, ratio


def _take_step(
    stream: _Stream,
    turns: Sequence[_Turn],
    pattern: SparsityPattern,
    drawn: Sequence[int],
    share_of_rate: float,
    generator: torch.Generator,
) -> None:
    """Move the matrices of the stream, and of the heads of the decoder layers with the numbers `drawn`, by one step.

    `turns` are changed: the first one is of the stream, the others are of the decoder layers. The objective is the sum
    of the logarithms of the errors of the drawn layers, each times the number of weights of its operator.
    """
    rotation = turns[0].value.clone().requires_grad_()
    for number in drawn:
        turn = turns[1 + number].value.clone().requires_grad_()
        with torch.enable_grad(), _quickly(stream.model.device):
            errors = stream.layers[number].errors(rotation[0], turn, pattern, generator)
            torch.stack([count * _log(error) for count, error in errors]).sum().backward()
        if turn.grad is not None:
            turns[1 + number].step(turn.grad, share_of_rate * _RATE_OF_HEADS)
    assert rotation.grad is not None
    turns[0].step(rotation.grad, share_of_rate * _RATE)


@torch.no_grad()
def _mean_log_error(stream: _Stream, turns: Sequence[_Turn], pattern: SparsityPattern) -> float:
    """Return the mean of the logarithm of the predicted error of all operators, weighted by their numbers of weights.

    `turns` are the matrices of the stream and of the decoder layers.
    """
    rotation = turns[0].value[0]
    errors: list[tuple[int, Tensor]] = []  # with the number of weights
    with _quickly(stream.model.device):
        for layer, turn in zip(stream.layers, turns[1:], strict=True):
            errors += layer.errors(rotation, turn.value, pattern)
    weighted = sum(count * float(_log(error)) for count, error in errors)
    return weighted / sum(count for count, _ in errors)


def _side_by_side(turns: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return the order of columns in which the members of a group of the pattern are side by side, int64 [n].

    `turns` are matrices [number, n, n], in which every (n / m)-th column is of one group. Without matrices, the order
    stays.
    """
    count = turns.shape[-1]
    span = pattern.span or 1
    members = span if len(turns) else 1
    return torch.arange(count, device=turns.device).view(members, -1).T.flatten()


def _quickly(device: torch.device) -> torch.autocast:
    """Inside, products are taken in bfloat16 if that is fast; weights are rotated in float64 elsewhere."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=is_fast(torch.bfloat16, device), cache_enabled=False
    )


def _damped(gram: Tensor) -> Tensor:
    """Return the inverse of a Gram matrix [in, in] with some damping, which is 1 if the matrix is zero."""
    damping = _DAMPING * float(gram.diagonal().mean())
    if damping == 0:
        damping = 1.0
    return damped_inverse(gram, damping)


def _log(error: Tensor) -> Tensor:
    """Return the logarithm of an error, that of the least normal float32 if it is zero."""
    return error.clamp_min(torch.finfo(torch.float32).tiny).log()


def _lost(scores: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return the sum of the scores [.., m, groups] that the pattern removes, a scalar.

    A member of a group is removed if at least n others of the group have larger scores; of equal ones the later member
    counts as smaller. Comparing all pairs is faster than sorting, and `scores` keeps its gradient.
    """
    members = scores.detach().unbind(-2)
    num_larger = torch.zeros_like(scores, dtype=torch.uint8)
    for i, j in itertools.combinations(range(len(members)), 2):
        is_smaller = members[i] < members[j]
        num_larger[..., i, :] += is_smaller
        num_larger[..., j, :] += ~is_smaller
    is_removed = num_larger >= pattern.num_kept((1, len(members)))
    return (scores * is_removed).sum()


def _some(count: int, generator: torch.Generator) -> Tensor:
    """Draw a random share of the numbers below `count`, int64."""
    return torch.randperm(count, generator=generator)[: math.ceil(_SHARE * count)]


def _matrix(operator: LinearOperator) -> Tensor:
    """Return the weight [out, in] as it is stored, no copy."""
    weight = operator.parameter.detach()
    return weight.T if operator.transposed else weight


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers with their names; shared ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers()


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits [tokens, vocabulary] of the first sequence of `ids`, on the CPU."""
    return model(input_ids=ids[:1].to(model.device), use_cache=False).logits[0].float().cpu()


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest relative difference of the logits of a token; both are [tokens, vocabulary]."""
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedArchitectureError:
    """Make the error for a model that can't be rotated, for a reason such as "it is a mixture of experts"."""
    return UnsupportedArchitectureError(
        f"{type(model).__name__} can't be rotated: {reason}. Prune it as it is."
    )


def _changes_outputs(model: PreTrainedModel, change: float) -> UnsupportedArchitectureError:
    """Make the error for a model that would give other outputs; `change` is the relative difference of its logits."""
    return _unsupported(model, f"its outputs would change (relative difference {change:.1e})")


if __name__ == "__main__":
    main()
