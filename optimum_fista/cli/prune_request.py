"""What `optimum-fista prune` was asked to do: frozen values, made once of the flags.

`PruneRequest.of` reads the flags, `require_possible` refuses what can't work before anything is read or printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimum_fista.cli.flags import given
from optimum_fista.config import FistaPruningConfig
from optimum_fista.options import PruningOptions


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

    @classmethod
    def of(
        cls, arguments: argparse.Namespace, config: FistaPruningConfig | None = None
    ) -> PruneRequest:
        """Read the parsed flags of `prune`; ValueError if the configuration makes no sense.

        `config` is used instead of what the flags say, for a run that `--target-size` has planned.
        """
        from optimum_fista.text.sources import usual_texts

        if config is None:
            config = _configuration(arguments)
        output = arguments.output
        if output is None:
            output = default_output(
                arguments.model, config, pattern_of_run(arguments.model, config)
            )
        sources = tuple(arguments.calibration or ())
        if not sources and config.tokens_removal is not None:
            sources = (usual_texts().to_calibrate_on,)
        return cls(
            model=arguments.model,
            config=config,
            output=output,
            sources=sources,
            num_samples=arguments.num_samples,
            sequence_length=arguments.sequence_length,
            batch_size=arguments.batch_size,
            device=arguments.device,
            dtype=arguments.dtype,
            storage_device=arguments.storage_device,
            overwrite=arguments.overwrite,
            packed=arguments.packed,
            push_to_hub=arguments.push_to_hub,
            private=arguments.private,
        )

    @property
    def source(self) -> str | None:
        """The source of calibration text, the first one of several; None: the default."""
        return self.sources[0] if self.sources else None

    @property
    def num_sequences(self) -> int:
        """Calibration sequences, with those that errors are measured on."""
        return self.num_samples + self.config.held_out

    def with_choices(self, *, batch_size: int, source: str) -> PruneRequest:
        """The request with the batch size and the source that an estimate has chosen."""
        return replace(self, batch_size=batch_size, sources=(source,))

    def reading(self, model: str) -> PruneRequest:
        """The request for another model."""
        return replace(self, model=model)

    def require_possible(self) -> None:
        """Refuse flags that can't work, with the flag's name; reads neither the model nor the text.

        Imports stand before the check that needs them: Transformers, which takes seconds, is needed last.
        """
        if Path(self.model).is_file() and Path(self.model).suffix == ".json":
            raise ValueError(
                f"MODEL {self.model!r} is a configuration without weights: pass its folder, or --dry-run too."
            )
        self.require_sizes()
        self.require_one_source()
        if self.private and not self.push_to_hub:
            raise ValueError("--private makes sense with --push-to-hub REPO only.")

        from optimum_fista.folder.output import require_output
        from optimum_fista.text.sources import require_source

        require_output(self.output, self.overwrite, source=self.model)
        has_images = False
        for source in self.sources:
            if source != "self":
                has_images = require_source(source, with_images=True) or has_images

        from optimum_fista.devices import storage_place, usable_device
        from optimum_fista.folder.hub import require_push
        from optimum_fista.prune.ranks import launched_processes, require_independent_layers
        from optimum_fista.removal.planning import require_zeros_to_pack
        from optimum_fista.source.model_folder import require_weights

        require_weights(self.model)
        usable_device(self.device)
        storage_place(self.storage_device)
        require_independent_layers(self.config, launched_processes())
        require_zeros_to_pack(self.config, self.packed)
        if self.push_to_hub:
            require_push(self.push_to_hub)
        if not self.overwrite:
            self._require_same_run(has_images)

    def require_sizes(self) -> None:
        """Refuse numbers of sequences and tokens that are too small."""
        if self.num_samples < 1:
            raise ValueError(f"--num-samples {self.num_samples}: pass at least 1.")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ValueError(f"--sequence-length {self.sequence_length}: pass at least 2.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: pass at least 1.")

    def require_one_source(self) -> None:
        """Refuse several sources of text, unless tokens are removed; then a model's own text is refused."""
        if self.config.tokens_removal is None and len(self.sources) > 1:
            raise ValueError(
                f"--calibration has {len(self.sources)} sources: pass one, or a pattern such as vocab:0.35."
            )
        if self.config.tokens_removal is not None and "self" in self.sources:
            raise ValueError(
                "--calibration self: a model's own text is too short for rare tokens, pass files or c4."
            )

    def _require_same_run(self, has_images: bool) -> None:
        """Refuse an unfinished run with other settings; other text is noticed when the run resumes."""
        from optimum_fista.folder.output import unfinished_folder
        from optimum_fista.prune.identity import require_same_run

        options = self.config.resolved().to_dict()
        wanted: dict[str, Any] = {
            "recovery": None,
            "sequences": self.num_sequences,
            "config": json.loads(json.dumps(options)),  # tuples become lists, as in the file
        }
        if self.sequence_length is not None and not has_images:
            wanted["length"] = self.sequence_length  # sequences with images may be shorter
        require_same_run(unfinished_folder(self.output), wanted)


def pattern_of_run(model: str, config: FistaPruningConfig) -> str:
    """The pattern with the shares of parts that a run removes: only whole numbers of parts can be removed.

    `model` is the name that the user gave. Its configuration is read, and refused if it can't lose these parts.
    """
    if config.whole_parts is None:
        return config.pattern
    from optimum_fista.model.layers import find_decoder_layers
    from optimum_fista.removal.parts import ModelOutline, removed_parts
    from optimum_fista.source.loading import model_without_weights, read_config

    outline = ModelOutline(find_decoder_layers(model_without_weights(read_config(model))))
    return "+".join(removed.pattern for removed in removed_parts(outline, config.whole_parts))


def default_output(model: str, config: FistaPruningConfig, pattern: str | None = None) -> Path:
    """The default output folder: the model's name and the pattern, as in `Llama-3.2-1B-50pct` or `model-2of4`.

    `pattern` is that of the run (`pattern_of_run`); `None`: that of the configuration.
    """
    if config.pattern == "unstructured":
        ending = f"{100 * (config.sparsity or 0.0):.6g}pct"
    else:
        ending = pattern or config.pattern
    ending = re.sub(r"(\d+):(\d+)", r"\1of\2", ending)
    ending = re.sub(r"[:+/]", "-", ending)
    is_path = Path(model).exists()
    name = Path(os.path.abspath(model)).name if is_path else model.rpartition("/")[2]
    return Path(f"{name}-{ending}")


def _configuration(arguments: argparse.Namespace) -> FistaPruningConfig:
    """Make the configuration: that of `--config` or `--recipe`, overridden by the given flags."""
    flags = given(arguments, PruningOptions)
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
