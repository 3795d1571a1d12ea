"""What `optimum-fista prune` was asked to do: frozen values, made once of the flags.

`PruneRequest.of` takes them from the parsed flags. `require_possible` refuses what can't work, before the model and the
text are read and before anything is printed. The *parts* that a pattern such as "channels:0.25" removes are MLP
channels, attention heads, experts or decoder layers; "vocab:0.35" removes tokens, in a run of another kind
(`FistaPruningConfig.tokens_removal`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimum_fista.cli.flags import given_options
from optimum_fista.config import FistaPruningConfig
from optimum_fista.options import PruningOptions
from optimum_fista.public_names import public_name


@dataclass(frozen=True)
class PruneRequest:
    """One run of `prune`; the fields without a comment are the flags of their names."""

    model: str  # Hub id or path
    config: FistaPruningConfig
    output: Path
    sources: tuple[str, ...]  # of calibration text, as for --calibration; empty: the default
    num_samples: int
    sequence_length: int | None
    batch_size: int | None
    device: str | None
    dtype: str
    storage_device: str | None
    overwrite: bool
    packed: bool
    push_to_hub: str | None
    private: bool | None  # None: the Hub decides
    measure: tuple[str, ...]  # sources of held-out texts, those of `protect` too
    protect: Mapping[str, float]  # of some of these, the factor that --protect gives

    @classmethod
    def of(
        cls, arguments: argparse.Namespace, config: FistaPruningConfig | None = None
    ) -> PruneRequest:
        """Make the request of `arguments`, the parsed flags of `prune`; ValueError if options contradict each other.

        `config` is used instead of the flags, for a run that `--target-size` has planned. If no output is given and
        whole parts are removed, the configuration of the model is read for the output's name; the Hub's client may
        download it. Files of `--config` are read, too. Changes nothing else.
        """
        from optimum_fista.text.sources import usual_texts

        if config is None:
            config = _configuration(arguments)
            _require_flags_with_meaning(arguments, config)
        num_samples = arguments.num_samples
        if num_samples is None:
            num_samples = 128  # as the help of the flag says
        output = arguments.output
        if output is None:
            pattern = pattern_of_run(arguments.model, config)  # with the shares that really go
            output = default_output(arguments.model, config, pattern)
        sources = tuple(arguments.calibration or ())  # None if the flag is not given
        if not sources and config.tokens_removal is not None:
            sources = (usual_texts().to_calibrate_on,)
        return cls(
            model=arguments.model,
            config=config,
            output=output,
            sources=sources,
            num_samples=num_samples,
            sequence_length=arguments.sequence_length,
            batch_size=arguments.batch_size,
            device=arguments.device,
            dtype=arguments.dtype,
            storage_device=arguments.storage_device,
            overwrite=arguments.overwrite,
            packed=arguments.packed,
            push_to_hub=arguments.push_to_hub,
            private=arguments.private,
            measure=measured_sources(arguments),
            protect=protected_sources(arguments),
        )

    @property
    def source(self) -> str | None:
        """The source of calibration text, the first one of several; None: an estimate chooses it."""
        return self.sources[0] if self.sources else None

    @property
    def public_sources(self) -> str:
        """The names of all sources of calibration text, such as "c4, code.txt", without the folders of the user."""
        return ", ".join(public_name(source) for source in self.sources)

    @property
    def num_sequences(self) -> int:
        """Number of calibration sequences, with those that errors are measured on (`--held-out`)."""
        return self.num_samples + self.config.held_out

    def with_choices(self, *, batch_size: int, source: str) -> PruneRequest:
        """Return this request with what an estimate has chosen: a batch size, and a source if the user named none."""
        return replace(self, batch_size=batch_size, sources=self.sources or (source,))

    def reading(self, model: str) -> PruneRequest:
        """Return this request for another model: a Hub id or path."""
        return replace(self, model=model)

    def measured_texts(self) -> dict[str, str]:
        """Read the held-out texts of `--measure` and `--protect`, by their sources; texts of the Hub are downloaded."""
        from optimum_fista.text.sources import text_of_model

        return {
            source: text_of_model(self.model, source, split="test").joined
            for source in self.measure
        }

    def require_measurable(self) -> None:
        """Refuse held-out texts that can't be read, are too short, or are among the calibration text (ValueError).

        `self.measure` are their sources, such as "code.txt"; empty if the user names none. `self.sources` are those of
        the calibration text. The tokenizer of the model is loaded to count tokens. Texts and a tokenizer of the Hub are
        downloaded into its cache; nothing else changes.
        """
        if not self.measure:
            return
        from optimum_fista.text.one_text import require_held_out

        require_held_out(self.measure, self.sources)

        from optimum_fista.prune.measuring import require_texts

        require_texts(self.model, self.measured_texts(), self.protect)

    def require_possible(self) -> None:
        """Refuse flags that can't work, with the flag's name; reads neither the model's weights nor the text.

        Removes files that a killed process left beside the output. For `--push-to-hub` it asks the Hub whether the
        user's token may write there. Imports stand before the check that needs them: Transformers, which takes
        seconds, is needed last.
        """
        if Path(self.model).is_file() and Path(self.model).suffix == ".json":
            raise ValueError(
                f"MODEL {self.model!r} is a configuration without weights: pass its folder, or --dry-run too."
            )
        self.require_sizes()
        self.require_sources()
        if self.private and not self.push_to_hub:
            raise ValueError(
                "--private makes sense with --push-to-hub REPO only: pass both, or none."
            )

        from optimum_fista.folder.output import require_output
        from optimum_fista.text.sources import require_source

        require_output(self.output, self.overwrite, source=self.model)
        has_images = False
        for source in self.sources:
            if source != "self" and require_source(source, with_images=True):
                has_images = True

        from optimum_fista.devices import storage_place, usable_device
        from optimum_fista.folder.hub import require_push
        from optimum_fista.prune.ranks import launched_processes, require_independent_layers
        from optimum_fista.removal.planning import require_zeros_to_pack
        from optimum_fista.source.model_folder import require_weights

        # Each of these raises an error if it has to; what some return is needed later only, by the run itself.
        require_weights(self.model)
        usable_device(self.device)
        storage_place(self.storage_device)
        require_independent_layers(self.config, launched_processes())
        require_zeros_to_pack(self.config, self.packed)
        if self.push_to_hub:
            require_push(self.push_to_hub)
        self.require_measurable()
        if not self.overwrite:  # then an unfinished run would resume
            self._require_same_run(has_images)

    def require_sizes(self) -> None:
        """Refuse numbers of sequences, of tokens in each, and of sequences in a batch that are too small (ValueError).

        The length and the batch size are None if the user leaves them open.
        """
        if self.num_samples < 1:
            raise ValueError(f"--num-samples {self.num_samples}: pass at least 1.")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ValueError(f"--sequence-length {self.sequence_length}: pass at least 2.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: pass at least 1.")

    def require_sources(self) -> None:
        """Refuse sources of calibration text that do not go together, or not with this run (ValueError).

        `self.sources` are such as ("c4", "code.txt"). No text may be there twice. If tokens are removed, all texts are
        counted, but "self", the model's own text, is refused. Otherwise each of several sources gives an equal share of
        the sequences. `.jsonl` files among several sources are read, to find out whether they have images.
        """
        from optimum_fista.text.one_text import require_different
        from optimum_fista.text.sources import require_source

        require_different(self.sources)
        if self.config.tokens_removal is not None:
            if "self" in self.sources:
                raise ValueError(
                    "--calibration self: a model's own text is too short for rare tokens, pass files or c4."
                )
            return
        number = len(self.sources)
        if number < 2:
            return

        if "self" in self.sources:
            raise ValueError(
                "--calibration self with other sources: a model's own text is not mixed with others, pass it alone or "
                "leave it out."
            )
        for source in self.sources:
            if source.endswith(".jsonl") and require_source(source, with_images=True):
                raise ValueError(
                    f"--calibration {source} has images, and there are other sources: pass it alone, or lines without "
                    '"image".'
                )
        if self.num_samples < number:
            raise ValueError(
                f"--num-samples {self.num_samples}: pass at least {number}, one for each source of --calibration."
            )
        if 0 < self.config.held_out < number:
            raise ValueError(
                f"--held-out {self.config.held_out}: pass at least {number}, one for each source of --calibration, "
                "or 0."
            )

    def _require_same_run(self, has_images: bool) -> None:
        """Refuse to resume an unfinished run of this output that had other settings.

        `has_images` tells whether the text has images. Texts are not compared here, but later, when the text is drawn.
        """
        from optimum_fista.folder.output import unfinished_folder
        from optimum_fista.prune.identity import journal_format, require_same_run

        config = self.config.resolved()
        # Some keys of the fingerprint that a run keeps in its unfinished folder.
        wanted: dict[str, Any] = {
            "recovery": None,  # a run of `recover` has a number here
            "sequences": self.num_sequences,
            "config": json.loads(
                json.dumps(config.to_dict())
            ),  # tuples become lists, as in the file
        }
        if config.whole_parts is None:  # so no experts are removed
            wanted["journal"] = journal_format(config, removes_experts=False)
        if self.sequence_length is not None and not has_images:
            wanted["length"] = self.sequence_length  # sequences with images may be shorter
        require_same_run(unfinished_folder(self.output), wanted)


def protected_sources(arguments: argparse.Namespace) -> dict[str, float]:
    """Read the flags `--protect FILE=1.02`: numbers by the source of the text. ValueError if one makes no sense.

    `arguments.protect` are the values of these flags, such as ["code.txt=1.02"]; None if there are none.
    """
    protected = dict[str, float]()
    for flag in arguments.protect or ():
        source, _, number = flag.rpartition("=")
        try:
            at_most = float(number)
        except ValueError:
            at_most = math.nan  # which the next check refuses
        if not source or not 1 <= at_most < math.inf:
            raise ValueError(
                f"--protect {flag!r}: pass a text and how many times its bits per byte may become, at least 1, such as "
                "code.txt=1.02."
            )
        if source in protected:
            raise ValueError(
                f"--protect has {source!r} with {protected[source]:g} and with {at_most:g}: pass one of them."
            )
        protected[source] = at_most
    return protected


def measured_sources(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The sources of `--measure` and of `--protect`, each once, in this order."""
    sources = [*(arguments.measure or ()), *protected_sources(arguments)]
    return tuple(dict.fromkeys(sources))


def pattern_of_run(model: str, config: FistaPruningConfig) -> str:
    """Return the pattern with the shares that a run really removes, because it removes whole numbers of parts.

    Without whole parts to remove it is the pattern of `config`. `model` is a Hub id or path. If parts are removed, its
    configuration is read, which the Hub's client may download, and ValueError says if it can't lose these parts. No
    weight is read.
    """
    if config.whole_parts is None:
        return config.pattern
    from optimum_fista.model.layers import find_decoder_layers
    from optimum_fista.removal.model_outline import ModelOutline
    from optimum_fista.removal.removed_parts import removed_parts
    from optimum_fista.source.loading import model_without_weights, read_config

    model_config = read_config(model)
    outline = ModelOutline(find_decoder_layers(model_without_weights(model_config)))
    removed = removed_parts(outline, config.whole_parts)  # one entry for each kind of part
    return "+".join(parts.pattern for parts in removed)


def default_output(model: str, config: FistaPruningConfig, pattern: str | None = None) -> Path:
    """Return the default output folder: the model's name and the pattern, such as "model-2of4" or "model-50pct".

    `model` is a Hub id or path. `pattern` is that of the run (`pattern_of_run`); `None`: that of the configuration.
    Creates nothing.
    """
    if config.pattern == "unstructured":
        assert config.sparsity is not None
        ending = f"{100 * config.sparsity:.6g}pct"
    elif pattern is not None:
        ending = pattern
    else:
        ending = config.pattern
    ending = re.sub(r"(\d+):(\d+)", r"\1of\2", ending)  # 2:4 becomes 2of4
    # channels:0.25+layers:0.1 becomes channels-0.25-layers-0.1
    ending = re.sub(r"[:+/]", "-", ending)

    name = model.rpartition("/")[2]  # of a Hub id
    if Path(model).exists():
        name = Path(os.path.abspath(model)).name  # also of "." and ".."
    return Path(f"{name}-{ending}")


def _configuration(arguments: argparse.Namespace) -> FistaPruningConfig:
    """Make the configuration that the flags ask for: that of `--config` or `--recipe`, overridden by other flags.

    `arguments.config` is a file, a folder or a Hub id, from which a configuration is read; `arguments.recipe` a name
    such as "fast". The configuration of a Hub id is downloaded into the cache; nothing else changes.
    """
    flags = given_options(arguments, PruningOptions)
    if arguments.recipe and arguments.config:
        raise ValueError(
            f"--recipe {arguments.recipe} and --config {arguments.config}: pass only one of them."
        )
    if arguments.recipe:
        return FistaPruningConfig.recipe(arguments.recipe, **flags)
    options: dict[str, Any] = {}
    if arguments.config:
        options = FistaPruningConfig.from_pretrained(arguments.config).to_dict()
    if "sparsity" in flags or "pattern" in flags:  # each of them decides the other
        options.pop("sparsity", None)
        options.pop("pattern", None)
    return FistaPruningConfig.from_dict(options | flags)


def _require_flags_with_meaning(arguments: argparse.Namespace, config: FistaPruningConfig) -> None:
    """Refuse flags about sequences if the run has none, because it removes tokens (ValueError).

    Such a run counts the tokens of whole texts. `arguments` are the parsed flags, and `config` is made of them. A flag
    that is not given is `None`.
    """
    if config.tokens_removal is None:
        return
    for name in ("num_samples", "sequence_length", "batch_size", "storage_device"):
        value = getattr(arguments, name)
        if value is not None:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} {value} has no meaning for --pattern {config.pattern}, which removes tokens: whole texts "
                "are counted. Leave it out."
            )
