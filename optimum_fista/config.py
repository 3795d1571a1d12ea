"""What to prune and how: the pruning configuration.

`options.py` declares each option with its type, choices and limits. This module says what the options mean together:
which pattern an operator gets, which defaults a method has, and which options contradict each other. A configuration
is frozen, and JSON keeps it unchanged: a report, a card and a resumed run have the same one. This module does not load
Transformers, so that the command line refuses wrong options quickly.

The name of an operator is that of its module, such as "model.layers.3.mlp.down_proj"; *name patterns* have wildcards
("*.mlp.*"). A *pattern* such as "2:4" says which zeros an operator may get. Other patterns remove *whole parts* of the
model ("channels:0.25", class `WholeParts`), or *tokens* of its vocabulary ("vocab:0.35", class `TokensRemoval`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_fista.options import PruningOptions, wrong_field
from optimum_fista.solve.method import MethodDefaults, PruningMethod
from optimum_fista.solve.methods import create_method, method_class
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.patterns import WholeParts, parse_pattern
from optimum_fista.tokens_removal import TokensRemoval
from optimum_fista.wildcards import matches

if TYPE_CHECKING:
    from optimum_fista.model.correction import Correction

# The published settings of FISTAPruner (arXiv 2408.03728, section 4); others have the defaults of `Fista`.
_PAPER = {"patience": 3, "max_trials": 30, "rounding_share": 0.3, "refit_iterations": 0}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    # The residual correction is 0 for zeros anyway, but not if whole parts are removed.
    "fast": {"error_correction": "none", "residual_correction": 0.0},
    "paper": {
        "method": "fista",
        "warm_start": "auto",
        "max_iterations": 20,
        "method_options": _PAPER,
    },
}
"""The options of each recipe (`FistaPruningConfig.recipe`) that are not the defaults."""

_CONFIG_FILE = "pruning_config.json"
_FILES = ("fista/report.json", _CONFIG_FILE)  # files of a folder that have a configuration
_DEFAULTS = PruningOptions()
_ALLOCATION_TOKENS = 1024  # by default
_ALLOCATION_TOKENS_OF_PARTS = 2048  # where whole parts are removed
_OPTIONS_OF_METHOD = ("warm_start", "max_iterations", "tolerance", "method_options")


@dataclass(frozen=True)
class FistaPruningConfig(PruningOptions):
    """Options of a pruning run, checked when constructed; `PruningOptions` declares and explains them."""

    def __post_init__(self) -> None:
        """Check all options (ValueError); set `sparsity` to that of the pattern, and sequences and mappings to copies.

        `self._usual_pattern` is the pattern of operators without an override, and `self.overrides` are sparsities or
        patterns by name pattern. `self.tokens_removal` is `None` unless the pattern removes tokens.
        """
        self._detach_from_caller()
        message = wrong_field(self)
        if message is not None:
            raise ValueError(message)
        if self.tokens_removal is not None:
            self._require_tokens_only(self.tokens_removal)
            return
        # Fields of a frozen dataclass are set in this way.
        object.__setattr__(self, "sparsity", self._usual_pattern.sparsity)
        self._require_meaning()
        method = self.create_method("")  # this checks the options of the method
        method.require_pattern(self._usual_pattern)
        for name_pattern, value in self.overrides.items():
            try:
                method.require_pattern(self._pattern_of(value))
            except ValueError as error:
                raise ValueError(f"overrides[{name_pattern!r}]: {error}") from error

    def _detach_from_caller(self) -> None:
        """Replace options that the caller may change later by copies: sequences by tuples, mappings by dictionaries.

        A single text becomes a tuple of one. Values of wrong types stay as they are, for the check that follows. Fields
        of a frozen dataclass are set by `object.__setattr__`.
        """
        for name in ("include", "exclude", "keep_tokens"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, (value,))
            elif isinstance(value, Iterable):
                object.__setattr__(self, name, tuple(value))
        for name in ("method_options", "overrides"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, dict(value))

    def _require_meaning(self) -> None:
        """Refuse options that the user has set although they mean nothing for this pattern (ValueError).

        Changes nothing. `self._usual_pattern` is the pattern of operators without an override. `self.whole_parts` is
        the same pattern if it removes whole parts, such as experts, and `None` if it sets zeros.
        """
        pattern = self._usual_pattern
        parts = self.whole_parts
        # By the name of each option that has no meaning: what to do instead. `keep_tokens` is for patterns that remove
        # tokens, which are checked elsewhere (`_require_tokens_only`).
        advice: dict[str, str] = {
            "keep_tokens": "leave it out, or pass a pattern such as 'vocab:0.35'"
        }
        if pattern.fixed and not self.overrides:  # such as 2:4, which leaves nothing to share
            advice["scope"] = "pass only one of them"
        if parts is not None:
            for name in ("include", "exclude", "overrides"):
                advice[name] = "whole parts are removed: pass only one of them"
        experts = [share for share in parts.shares if share.kind == "experts"] if parts else []
        if not experts:
            for name in ("expert_refit", "keep_divisible"):
                advice[name] = "leave it out, or pass a pattern such as 'experts:0.25'"
        elif experts[0].multiple_of is not None:  # a pattern such as experts:0.25/8 says it, too
            advice["keep_divisible"] = "pass only one of them"
        # The order of the channels matters only if single weights compete with their neighbours: in a pattern such as
        # 2:4 (`span` is 4, `width` is 1), but not in pairs (`width` is 2), nor without groups (`span` is None).
        if pattern.span is None or pattern.width != 1:
            advice["reorder_channels"] = "leave it out, or pass a pattern such as '2:4'"
        for name, instead in advice.items():
            value = getattr(self, name)
            is_set_by_user = value != getattr(_DEFAULTS, name)
            if is_set_by_user:
                raise ValueError(
                    f"{name}={value!r} has no meaning for pattern={self.pattern!r}: {instead}."
                )

    @classmethod
    def paper(
        cls, sparsity: float | None = None, pattern: str = "unstructured", **options: Any
    ) -> FistaPruningConfig:
        """Make the configuration with the published settings of FISTAPruner (arXiv 2408.03728).

        docs/method.md lists them; `options` override them. `sparsity` is the share of weights to set to zero, `None`
        that of the `pattern`.
        """
        return cls.recipe("paper", sparsity=sparsity, pattern=pattern, **options)

    @classmethod
    def recipe(cls, name: str, **options: Any) -> FistaPruningConfig:
        """Make the configuration of the recipe `"default"`, `"fast"` or `"paper"`; docs/quickstart.md compares them.

        `options` are fields of the configuration, and override those of the recipe. If they name another `method`, the
        recipe's options for its method are left out.
        """
        if name not in RECIPES:
            raise ValueError(f"recipe={name!r}: pass one of {', '.join(map(repr, RECIPES))}.")
        settings = RECIPES[name]
        method_of_recipe = settings.get("method")  # None: the default
        has_other_method = options.get("method", method_of_recipe) != method_of_recipe
        if has_other_method:
            settings = {
                key: value for key, value in settings.items() if key not in _OPTIONS_OF_METHOD
            }
        return cls(**(settings | options))

    def create_method(self, model_type: str) -> PruningMethod:
        """Create the method (`self.method` is its name) with its options; ValueError if it does not take them.

        `model_type` is that of the model's configuration, such as "llama", or "" if it does not matter. It decides
        what `warm_start="auto"` means. The configuration stays as it is.
        """
        options = dict(self.method_options)
        for name in ("max_iterations", "tolerance", "warm_start"):
            value = getattr(self, name)
            if value is not None:
                options[name] = value
        if options.get("warm_start") == "auto":
            # As published: FISTAPruner starts OPT from SparseGPT, Llama from Wanda.
            options["warm_start"] = "sparsegpt" if model_type == "opt" else "wanda"
        try:
            method = create_method(self.method, **options)  # the function of `solve.methods`
            message = wrong_field(method)  # the options of a method are its fields
        except TypeError as error:  # the method compared text or None with a number
            raise ValueError(
                f"method_options={options!r}: pass numbers where method {self.method!r} takes them ({error})."
            ) from error
        if message is not None:
            raise ValueError(message)
        return method

    @property
    def whole_parts(self) -> WholeParts | None:
        """The pattern if it removes whole parts, such as channels; `None` if it sets zeros or removes tokens."""
        if self.tokens_removal is not None:
            return None
        pattern = self._usual_pattern
        if not isinstance(pattern, WholeParts):
            return None
        if self.keep_divisible is None:
            return pattern
        # The text of the pattern stays the same: the option belongs to the share of the experts.
        shares = tuple(
            dataclasses.replace(share, divisible_by=self.keep_divisible)
            if share.kind == "experts"
            else share
            for share in pattern.shares
        )
        return dataclasses.replace(pattern, shares=shares)

    @cached_property
    def tokens_removal(self) -> TokensRemoval | None:
        """Which tokens to remove, of a pattern such as "vocab:0.35"; `None` for a pattern of another kind."""
        return TokensRemoval.read(self.pattern, self.keep_tokens)

    def pattern_for(self, name: str) -> SparsityPattern:
        """Return the sparsity pattern of the operator called `name`, such as "model.layers.3.mlp.down_proj".

        It is that of the first override whose name pattern matches, or else that of all operators without an override.
        """
        for name_pattern in self.overrides:
            if matches(name, (name_pattern,)):
                return self._override_patterns[name_pattern]
        return self._usual_pattern

    def reason_left_dense(self, name: str) -> str | None:
        """Return why the user's options leave the operator called `name` dense; `None` if they do not.

        `name` is such as "model.layers.3.mlp.down_proj". `self.include` and `self.exclude` are name patterns; an empty
        `include` matches all operators.
        """
        if matches(name, self.exclude):
            return "exclude"
        if self.include and not matches(name, self.include):
            return "not in include"
        if self.pattern_for(name).sparsity == 0:
            return "sparsity 0"
        return None

    def idle_patterns(self, names: Sequence[str]) -> Iterator[str]:
        """Yield a message for each option with name patterns that match none of the model's linear operators `names`.

        Users often write such patterns with ".weight" at the end. `names` are such as "model.layers.3.mlp.down_proj";
        there is one at least, which the message shows.
        """
        for option in ("include", "exclude", "overrides"):
            idle_patterns = []
            for name_pattern in getattr(self, option):
                if not any(matches(name, (name_pattern,)) for name in names):
                    idle_patterns.append(name_pattern)
            if idle_patterns:
                shown = ", ".join(map(repr, idle_patterns))
                yield f"{option}: {shown} matches no linear operator of the decoder layers: {names[0]!r} is one."

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values, ready for JSON."""
        values = dataclasses.asdict(self)
        for name in ("include", "exclude", "keep_tokens"):
            values[name] = list(values[name])  # JSON has no tuples
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FistaPruningConfig:
        """Make a configuration of the values that `to_dict` returns, or of some of them; refuse unknown names.

        `values` are by the name of the option, and stay as they are.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(
                f"unknown options {', '.join(map(repr, unknown))}: pass some of {', '.join(names)}."
            )
        return cls(**values)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `pruning_config.json` to a folder, for `from_pretrained` and `--config`; make the folder if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / _CONFIG_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, source: str | Path) -> FistaPruningConfig:
        """Read a configuration: of a pruned folder or Hub id, a folder of `save_pretrained`, or a JSON file.

        Files of the Hub are downloaded to its cache. ValueError if the JSON is no configuration.
        """
        # Transformers takes seconds to import: most uses of this module do without it.
        from transformers.utils import cached_file

        file = Path(source)
        if not file.is_file():
            for name in _FILES:
                path = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
                if path is not None:
                    file = Path(path)
                    break
            else:
                raise FileNotFoundError(
                    f"{str(source)!r} holds neither {' nor '.join(_FILES)}: pass a pruned folder."
                )
        try:
            values = json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"config {str(file)!r} is not JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(
                f"config {str(file)!r} holds a JSON {type(values).__name__}: pass an object of options."
            )
        is_report = "operators" in values
        options = values["config"] if is_report else values  # of a report it is one entry
        return cls.from_dict(options)

    def resolved(self) -> FistaPruningConfig:
        """Return a configuration in which options that are `None` have the value that the method chooses.

        These are the options of `MethodDefaults`, such as `allocation`, and `allocation_tokens`, which the kind of the
        pattern chooses. `scope` stays `None` if it has no meaning. This configuration itself stays as it is.
        """
        chosen = {
            name: value for name, value in self._choices().items() if getattr(self, name) is None
        }
        # A pattern such as 2:4 has no scope, but an override may be a sparsity, which has one.
        has_scope = self.tokens_removal is None and not self._usual_pattern.fixed
        if not has_scope and not self.overrides:
            chosen.pop("scope", None)
        return dataclasses.replace(self, **chosen)

    def _choices(self) -> dict[str, Any]:
        """Values for options that the user leaves `None`, by name: of the method, and of the kind of the pattern."""
        choices = dict(vars(self._method_defaults))
        choices["allocation_tokens"] = (
            _ALLOCATION_TOKENS if self.whole_parts is None else _ALLOCATION_TOKENS_OF_PARTS
        )
        return choices

    @cached_property
    def correction(self) -> Correction:
        """Which errors operators compensate for: `error_correction` and `residual_correction`, joined.

        Options that are `None` have the method's own values.
        """
        # This module imports Transformers, which takes seconds: a configuration alone does not need it.
        from optimum_fista.model.correction import Correction

        config = self.resolved()
        # `resolved` has put the method's own value there.
        assert config.error_correction is not None
        return Correction.parse(config.error_correction, config.residual_correction or 0.0)

    @property
    def _method_defaults(self) -> MethodDefaults:
        """The values of options that the user leaves to the method; they depend on the pattern without an override."""
        method = method_class(self.method)
        chosen: MethodDefaults | None = None
        if self.whole_parts is not None:
            chosen = method.defaults_of_parts
        elif self.tokens_removal is None:
            pattern = self._usual_pattern
            is_up_to_half = not pattern.fixed and pattern.sparsity <= 0.5
            # A residual correction, which the user asks for here, wants to see all errors of the layer.
            if is_up_to_half and not self.residual_correction:
                chosen = method.defaults_up_to_half
        return method.defaults if chosen is None else chosen

    @property
    def may_refit_experts(self) -> bool:
        """Whether experts are removed, and those that stay are refitted if the calibration has several texts."""
        parts = self.whole_parts
        removes_experts = parts is not None and any(
            share.kind == "experts" for share in parts.shares
        )
        return removes_experts and self.expert_refit

    def shares_budget(self, name: str) -> bool:
        """Tell whether the number of zeros of the operator called `name` is decided by the allocation "fisher".

        `self.allocation` is the user's option, and `None` leaves it to the method. An operator with an override, or a
        fixed pattern such as 2:4, has a number of zeros of its own.
        """
        allocation = self.allocation
        if allocation is None:
            allocation = self._method_defaults.allocation
        if allocation != "fisher":
            return False
        if self._usual_pattern.fixed:
            return False  # 2:4 leaves nothing to share out
        # An override is a number of zeros that the user has chosen.
        return not matches(name, tuple(self.overrides))

    @cached_property
    def _usual_pattern(self) -> SparsityPattern:
        """The pattern of all operators without an override, read once."""
        return self._pattern_of(None)

    @cached_property
    def _override_patterns(self) -> dict[str, SparsityPattern]:
        """The pattern of each override, by its name pattern, read once."""
        return {name: self._pattern_of(value) for name, value in self.overrides.items()}

    def _require_tokens_only(self, tokens: TokensRemoval) -> None:
        """Refuse options that have no meaning if tokens are removed, and set `sparsity` to the share of the tokens.

        `tokens` is `self.tokens_removal`. Its share is `None` for "vocab:unused", and `sparsity` then becomes 0.
        ValueError if an option has no meaning, and its value is neither the default nor what the method would choose.
        The report of such a run has the choices of the method (`resolved`), and its configuration can be read again.
        """
        share = 0.0 if tokens.share is None else tokens.share
        if self.sparsity is not None and abs(self.sparsity - share) > 1e-9:
            raise ValueError(
                f"sparsity={self.sparsity!r} and pattern={self.pattern!r} disagree: pass only the pattern, and to set "
                "zeros prune the model with fewer tokens again."
            )
        object.__setattr__(self, "sparsity", share)

        for name in (
            "method",  # first: the values that the others may have depend on it
            *_OPTIONS_OF_METHOD,
            "error_correction",
            "residual_correction",
            "allocation",
            "allocation_tokens",
            "scope",
            "include",
            "exclude",
            "overrides",
            "expert_refit",
            "keep_divisible",
            "reorder_channels",
            "held_out",  # a part of the text is always held out
        ):
            value = getattr(self, name)
            default = getattr(_DEFAULTS, name)
            chosen = [default, self._choices().get(name, default)]
            if name == "allocation_tokens":
                # Older versions chose it for all runs, and their reports have it.
                chosen.append(_ALLOCATION_TOKENS_OF_PARTS)
            if value not in chosen:
                raise ValueError(
                    f"{name}={value!r} has no meaning for pattern={self.pattern!r}, which removes tokens: leave out "
                    "the option, or the recipe that sets it."
                )

    def _pattern_of(self, override: float | str | None) -> SparsityPattern:
        """Read the pattern of operators with an override: a pattern such as "2:4", or a sparsity.

        `None` stands for operators without an override: they have `self.pattern` and `self.sparsity`. `self.scope` says
        what shares the zeros of a pattern that is not fixed ("matrix" or "row"); `None` leaves it to the method.
        """
        if isinstance(override, str):
            return parse_pattern(override)
        scope = self.scope
        if scope is None:
            scope = method_class(self.method).defaults.scope
        if override is None:
            return parse_pattern(self.pattern, self.sparsity, scope)
        return parse_pattern(sparsity=override, scope=scope)
