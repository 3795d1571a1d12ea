"""What to prune and how: the pruning configuration."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from optimum_fista.model.architecture import matches
from optimum_fista.model.correction import Correction
from optimum_fista.model.expert_removal import Saliency
from optimum_fista.model.products import COMPUTE_DTYPES
from optimum_fista.run.records import wrong_field
from optimum_fista.solve.method import PruningMethod
from optimum_fista.solve.methods import METHODS, create_method
from optimum_fista.solve.pattern import Scope, SparsityPattern
from optimum_fista.solve.patterns import WholeParts, parse_pattern

ErrorCorrection = Literal["none", "intra", "full"] | float
Allocation = Literal["uniform", "fisher"]


@dataclass(frozen=True)
class MethodDefaults:
    """What a method's source uses for options of `FistaPruningConfig` that the caller leaves `None`."""

    scope: Scope = "matrix"
    error_correction: ErrorCorrection = 0.0
    residual_correction: float = 0.0
    allocation: Allocation = "uniform"


_METHOD_DEFAULTS = {
    "dsnot": MethodDefaults(scope="row"),
    "fista": MethodDefaults(error_correction="intra"),
    "flap": MethodDefaults(error_correction="none"),
    "magnitude": MethodDefaults(error_correction="none"),
    "obs_admm": MethodDefaults(error_correction=0.5, residual_correction=1.0, allocation="fisher"),
    "taylor": MethodDefaults(error_correction="none"),
    "wanda": MethodDefaults(scope="row"),
}


def method_defaults(name: str) -> MethodDefaults:
    """The options that a method uses if the caller leaves them `None`."""
    return _METHOD_DEFAULTS.get(name, MethodDefaults())


_RECIPE_FOLDER = Path(__file__).parent / "recipes"
RECIPES = ("default", "fast", "best", "paper")
"""Names for `FistaPruningConfig.recipe`. Each has a JSON file in `recipes`, with what differs from the defaults."""

_OPTIONS_OF_METHOD = ("warm_start", "max_iterations", "tolerance", "method_options")
_OLD_NAMES = {"starved_tokens": "under_calibrated_tokens", "starved_method": "under_calibrated_method"}


def renamed_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Saved options, with the names that they have now if an older version wrote them."""
    return {name if (new := _OLD_NAMES.get(name, name)) in values else new: value for name, value in values.items()}


def require_seed(seed: int) -> None:
    """Refuse a seed that PyTorch can't take.

    Raises:
        ValueError: If it is one.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: pass a whole number from 0 to {2**64 - 1}.")


@dataclass(frozen=True)
class FistaPruningConfig:
    """Options of a pruning run, validated when constructed.

    Attributes:
        sparsity: Fraction of zeros in [0, 1). If it is `None` and no other pattern is given, 0.5.
        pattern: `"unstructured"`: any weights become zero. `"n:m"`, such as `"2:4"`: n weights are kept of every m
            consecutive inputs. `"4:8-pairs"`: of every eight consecutive inputs, two of the four pairs are kept whole.
            `"channels:0.25"`, `"heads:0.25"`, `"experts:0.25"`, `"layers:0.25"`, or some joined by `"+"`: this share of
            the MLPs' channels, of the key-value heads with their query heads, of the experts of mixtures, or of the
            decoder layers is removed, and a smaller dense model is left. `"bytes:0.75"`, `"active:0.75"` or
            `"latency:0.75"`: the run chooses channels, heads and decoder layers to remove, so that this share is left
            of the model's bytes, of the weights that a token uses, or of the time to decode a token. After a comma
            comes the pattern, or the fraction of zeros, of what stays: `"channels:0.25,2:4"`.
        scope: Unstructured only: `"matrix"` shares the zeros over a whole operator, `"row"` gives every output
            the same number. `None`: as in the method's source (by row for Wanda and DSnoT, by matrix for the others).
        method: One of `optimum_fista.solve.methods.METHODS`, or an instance of a registered method
            (`optimum_fista.solve.method.register`), which is kept as its name and `method_options`. It decides the
            options that are `None` (`MethodDefaults`); `resolved()` fills them in.
        error_correction: Which inputs `X*` an operator is pruned on, and which outputs it aims at. `"none"`: the dense
            network's inputs `X` and outputs `W X`. `"intra"`: inputs from the pruned operators before it in the decoder
            layer, outputs `W X`. `"full"`: inputs from all pruned operators before it, outputs `W X`. A number `a` in
            [0, 1]: as `"full"`, with the outputs `W (a X + (1 - a) X*)`; 0 corrects nothing, as in the sources of
            SparseGPT and Wanda.
        residual_correction: In [0, 1]: share of the error in the rest of a decoder layer's output that its last
            operator (the down projection) compensates for, if its output is added to the residual stream. It has no
            effect with `error_correction="none"`.
        allocation: `"uniform"`: every operator gets `sparsity`. `"fisher"`: the operators share the zeros so that the
            loss of the model, as its gradients predict it, grows least; `sparsity` holds for all of them together.
            Operators with an entry in `overrides` don't take part, and n:m patterns stay uniform.
        allocation_tokens: Number of calibration tokens on which the loss and its gradients are computed: for
            `allocation="fisher"`, for the method `"taylor"`, and to choose decoder layers, or parts for a size.
        held_out: Number of calibration sequences, the last ones, to which no weight is fitted: they run through the
            network like the others, and the report has every operator's error on them as well.
        warm_start: `"dense"`, `"magnitude"`, `"wanda"`, `"sparsegpt"`, or `"auto"`, the paper's rule: SparseGPT
            for OPT, Wanda for other families. `None`: the method's default.
        max_iterations: Iteration limit of the method; `None`: the method's default.
        tolerance: Relative change at which the method stops; `None`: the method's default.
        method_options: Further options of the method, by name.
        include: Shell-style name patterns of the operators to prune; empty means every linear operator of the
            decoder layers.
        exclude: Shell-style name patterns of the operators to leave dense.
        overrides: Sparsity (a number) or pattern (text) by shell-style name pattern. The first match counts;
            0 leaves an operator dense.
        under_calibrated_tokens: An expert of a mixture is under-calibrated if the router sends it fewer calibration
            tokens than this.
        under_calibrated_method: The method that prunes under-calibrated experts, with its default options.
        expert_saliency: Which experts stay if some are removed. `"reap"`: those whose outputs, times the router's
            weights, are largest on average over the tokens that they get. `"frequency"`: those that the router chooses
            most often. `"random"`: any.
        expert_refit: Whether the down projections of the experts that stay are refitted, so that together they return
            what the dense mixture does.
        reorder_channels: Whether the channels of MLPs change places first, so that the pattern keeps more of the down
            projection (`"n:m"` only). Rows and columns move together, so the dense model computes the same.
        finetune: `"layer"`: once a decoder layer is pruned, its kept weights are trained together by Adam on the
            calibration tokens, so that it returns the hidden states of the dense network. `None`: they are not.
        finetune_steps: Steps for each decoder layer, one calibration batch a step.
        finetune_learning_rate: The largest learning rate of these steps.
        compute_dtype: Dtype in which float32 matrices are multiplied in forward passes, in gradients, and in sums over
            calibration tokens: `"float32"`, `"bfloat16"` (on CUDA, TensorFloat-32), or `"auto"`: bfloat16 on
            accelerators and on CPUs with AMX or AVX512-BF16, otherwise float32. Layer problems are always solved in
            float32.
        seed: Seed of everything random: sampling of calibration windows and texts, order of batches, random experts.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    scope: Scope | None = None
    method: str | PruningMethod = "obs_admm"
    error_correction: ErrorCorrection | None = None
    residual_correction: float | None = None
    allocation: Allocation | None = None
    allocation_tokens: int = 2048
    held_out: int = 0
    warm_start: str | None = None
    max_iterations: int | None = None
    tolerance: float | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, float | str] = field(default_factory=dict)
    under_calibrated_tokens: int = 128
    under_calibrated_method: str = "magnitude"
    expert_saliency: Saliency = "reap"
    expert_refit: bool = True
    reorder_channels: bool = False
    finetune: Literal["layer"] | None = None
    finetune_steps: int = 32
    finetune_learning_rate: float = 3e-4
    compute_dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if isinstance(value, Iterable):
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in ("method_options", "overrides"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, dict(value))
        if isinstance(self.method, PruningMethod):
            self._name_the_method(self.method)
        self._check_values()
        object.__setattr__(self, "sparsity", self._default_pattern().sparsity)
        self._check_combinations()

    def _check_values(self) -> None:
        """Refuse values that no run can have."""
        wrong = wrong_field(self)
        if wrong is not None:
            raise ValueError(wrong)
        Correction.parse(
            "none" if self.error_correction is None else self.error_correction, self.residual_correction or 0.0
        )
        if self.allocation not in (None, "uniform", "fisher"):
            raise ValueError(f"allocation={self.allocation!r}: pass 'uniform' or 'fisher'.")
        if self.finetune not in (None, "layer"):
            raise ValueError(f"finetune={self.finetune!r}: pass 'layer', or None for no fine-tuning.")
        if self.expert_saliency not in get_args(Saliency):
            raise ValueError(
                f"expert_saliency={self.expert_saliency!r}: pass {' or '.join(map(repr, get_args(Saliency)))}."
            )
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"compute_dtype={self.compute_dtype!r}: pass {', '.join(COMPUTE_DTYPES)}.")
        rate = self.finetune_learning_rate
        if not 0 < rate < math.inf:
            raise ValueError(f"finetune_learning_rate={rate!r}: pass a number above 0, such as 3e-4.")
        wholes = {"allocation_tokens": 2, "held_out": 0, "under_calibrated_tokens": 0, "finetune_steps": 1}
        for name, least in wholes.items():
            number = getattr(self, name)
            if number < least:
                raise ValueError(f"{name}={number!r}: pass a whole number of at least {least}.")
        require_seed(self.seed)
        if self.under_calibrated_method not in METHODS:
            raise ValueError(
                f"under_calibrated_method={self.under_calibrated_method!r}: "
                f"pass one of {', '.join(map(repr, sorted(METHODS)))}."
            )

    def _check_combinations(self) -> None:
        """Refuse options that have no meaning together, and methods that can't prune to the patterns."""
        if self.scope is not None and self._pattern_of_weights().fixed and not self.overrides:
            raise ValueError(
                f"scope={self.scope!r} has no meaning for pattern={self.pattern!r}: pass only one of them."
            )
        given = {name: value for name in ("include", "exclude", "overrides") if (value := getattr(self, name))}
        if self.whole_parts is not None and given:
            name, value = next(iter(given.items()))
            raise ValueError(
                f"{name}={value!r} has no meaning for pattern={self.pattern!r}, which removes whole parts of the "
                "model: pass only one of them."
            )
        shares = () if self.whole_parts is None else self.whole_parts.shares
        loses_experts = any(part.kind == "experts" for part in shares)
        for name, usual in (("expert_saliency", "reap"), ("expert_refit", True)):
            if getattr(self, name) != usual and not loses_experts:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning for pattern={self.pattern!r}, which removes no "
                    "experts: leave it out, or pass a pattern such as 'experts:0.25'."
                )
        if loses_experts and self._pattern_of_weights() != self.whole_parts:
            raise ValueError(
                f"pattern={self.pattern!r}: one run can't remove experts and set zeros: prune with what is before the "
                "comma, and then prune the smaller model with what is after it."
            )
        if loses_experts and self.finetune is not None:
            raise ValueError(
                f"finetune={self.finetune!r} can't train decoder layers that lose experts (pattern={self.pattern!r}): "
                "pass finetune=None; experts that stay are refitted (expert_refit)."
            )
        if self.reorder_channels and not self._default_pattern().orders_inputs:
            raise ValueError(
                f"reorder_channels=True has no meaning for pattern={self.pattern!r}: leave it out, or pass a pattern "
                "such as '2:4'."
            )
        methods = self.create_method(""), METHODS[self.under_calibrated_method]()
        for method in methods:
            method.require_pattern(self._default_pattern())
            method.require_pattern(self._pattern_of_weights())
        for pattern, value in self.overrides.items():
            try:
                for method in methods:
                    method.require_pattern(self._override_pattern(value))
            except ValueError as error:
                raise ValueError(f"overrides[{pattern!r}]: {error}") from error

    @classmethod
    def paper(cls, sparsity: float | None = None, pattern: str = "unstructured", **options: Any) -> FistaPruningConfig:
        """The published settings of FISTAPruner (arXiv 2408.03728); docs/method.md lists them."""
        return cls.recipe("paper", sparsity=sparsity, pattern=pattern, **options)

    @classmethod
    def recipe(cls, name: str, **options: Any) -> FistaPruningConfig:
        """The settings of a recipe; docs/quickstart.md compares the recipes.

        Args:
            name: `"default"`, `"fast"`, `"best"` or `"paper"`.
            options: Options of this class, which override the recipe's. If `method` is another than the recipe's, the
                recipe's options of its own method are left out.

        Raises:
            ValueError: If there is no such recipe.
        """
        if name not in RECIPES:
            raise ValueError(f"recipe={name!r}: pass one of {', '.join(map(repr, RECIPES))}.")
        settings = json.loads((_RECIPE_FOLDER / f"{name}.json").read_text())
        if options.get("method", settings.get("method")) != settings.get("method"):
            settings = {key: value for key, value in settings.items() if key not in _OPTIONS_OF_METHOD}
        return cls(**(settings | options))

    def create_method(self, model_type: str) -> PruningMethod:
        """The method with its options; `model_type` (as in a model's config) decides `warm_start="auto"`.

        Raises:
            ValueError: If the method does not exist, does not take one of the options, or wants it of another type.
        """
        options = dict(self.method_options)
        named = ("max_iterations", "tolerance", "warm_start")
        options |= {name: value for name in named if (value := getattr(self, name)) is not None}
        if options.get("warm_start") == "auto":
            options["warm_start"] = "sparsegpt" if model_type == "opt" else "wanda"
        try:
            method = create_method(str(self.method), **options)
            wrong = wrong_field(method)
        except TypeError as error:  # a method's own checks compare numbers
            wrong = f"method_options={options!r}: pass numbers where method {self.method!r} takes them ({error})."
        if wrong is not None:
            raise ValueError(wrong)
        return method

    def _name_the_method(self, method: PruningMethod) -> None:
        """Keep an instance as its name and options, which JSON can hold."""
        if METHODS.get(getattr(method, "name", "")) is not type(method):
            raise ValueError(
                f"method={method!r}: {type(method).__qualname__} has no registered name, which a report needs: "
                "decorate the class with optimum_fista.solve.method.register."
            )
        if self.method_options:
            raise ValueError(f"method_options={self.method_options!r}: give them to the instance passed as method.")
        fields = {f.name: (getattr(method, f.name), f.default) for f in dataclasses.fields(method) if f.init}  # type: ignore[arg-type]
        object.__setattr__(self, "method", method.name)
        object.__setattr__(
            self, "method_options", {name: value for name, (value, default) in fields.items() if value != default}
        )

    @property
    def needs_gradients(self) -> bool:
        """Whether a method reads gradients of the loss."""
        return any(METHODS[name].needs_gradients for name in (str(self.method), self.under_calibrated_method))

    def with_parts(self, parts: str) -> FistaPruningConfig:
        """The same, with a pattern of explicit parts instead of the size to reach."""
        _, comma, then = self.pattern.partition(",")
        return dataclasses.replace(self, pattern=f"{parts}{comma}{then}", sparsity=None)

    @property
    def whole_parts(self) -> WholeParts | None:
        """The pattern, if it removes whole parts of the model."""
        pattern = self._default_pattern()
        return pattern if isinstance(pattern, WholeParts) else None

    def pattern_for(self, name: str) -> SparsityPattern:
        """The sparsity pattern of the operator called `name`."""
        for pattern, value in self.overrides.items():
            if matches(name, (pattern,)):
                return self._override_pattern(value)
        return self._default_pattern()

    def reason_left_dense(self, name: str) -> str | None:
        """Why the operator called `name` is left dense; `None` if it is to be pruned."""
        if matches(name, self.exclude):
            return "exclude"
        if self.include and not matches(name, self.include):
            return "not in include"
        return "sparsity 0" if self.pattern_for(name).sparsity == 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = dataclasses.asdict(self)
        return values | {"include": list(self.include), "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FistaPruningConfig:
        """Inverse of `to_dict`; also reads what older versions saved.

        Raises:
            ValueError: If a key is no option.
        """
        values = renamed_options(values)
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown options {', '.join(map(repr, unknown))}: pass some of {', '.join(known)}.")
        return cls(**values)

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | Path) -> FistaPruningConfig:
        """Read JSON text, or a JSON file when given a `Path`: a configuration, or the report of a run that had it.

        Raises:
            ValueError: If it is not a JSON object of valid options.
        """
        where = f"config {str(text)!r}" if isinstance(text, Path) else "config"
        try:
            values = json.loads(text.read_text() if isinstance(text, Path) else text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where} holds a JSON {type(values).__name__}: pass an object of options.")
        return cls.from_dict(values["config"] if "operators" in values else values)

    def resolved(self) -> FistaPruningConfig:
        """The same configuration with the method's own choice for every option of `MethodDefaults` that is `None`."""
        defaults = method_defaults(str(self.method))
        chosen = {name: getattr(self, name) for name in (f.name for f in dataclasses.fields(defaults))}
        if self._pattern_of_weights().fixed and not self.overrides:
            chosen.pop("scope")
        missing = {name: getattr(defaults, name) for name, value in chosen.items() if value is None}
        return dataclasses.replace(self, **missing)

    @property
    def correction(self) -> Correction:
        """`error_correction` and `residual_correction`, the method's own if they are `None`."""
        chosen = self.resolved()
        assert chosen.error_correction is not None
        return Correction.parse(chosen.error_correction, chosen.residual_correction or 0.0)

    def shares_budget(self, name: str) -> bool:
        """Whether the operator called `name` takes part in the allocation of zeros."""
        allocation = self.allocation or method_defaults(str(self.method)).allocation
        allocated = allocation == "fisher" and not self._pattern_of_weights().fixed
        return allocated and not any(matches(name, (pattern,)) for pattern in self.overrides)

    def _scope(self) -> Scope:
        return self.scope or method_defaults(str(self.method)).scope

    def _default_pattern(self) -> SparsityPattern:
        return parse_pattern(self.pattern, self.sparsity, self._scope())

    def _pattern_of_weights(self) -> SparsityPattern:
        """The pattern; if whole parts go and zeros follow, that of the zeros."""
        pattern = self._default_pattern()
        return pattern.then or pattern if isinstance(pattern, WholeParts) else pattern

    def _override_pattern(self, value: float | str) -> SparsityPattern:
        if isinstance(value, str):
            return parse_pattern(value)
        return parse_pattern(sparsity=value, scope=self._scope())
