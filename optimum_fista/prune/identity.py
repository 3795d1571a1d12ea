"""The identity of a run from files to files: its fingerprint, and whether an unfinished folder holds the same run.

The fingerprint is everything that the bytes of a result depend on. So the same command finds its own decoder layers and
no others. `run_fingerprint` makes it, and `join_run` compares it with what lies in the unfinished folder.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimum_fista import internals
from optimum_fista.atomic import read_record
from optimum_fista.config import FistaPruningConfig
from optimum_fista.folder.output import RUN_FILE, discard
from optimum_fista.model.calibration import CalibrationBatch, sources_of
from optimum_fista.prune.plan import Plan
from optimum_fista.prune.ranks import Ranks
from optimum_fista.prune.source_files import SourceFiles
from optimum_fista.report import PruningReport
from optimum_fista.source.model_folder import CONFIG_FILE
from optimum_fista.versions import library_versions

# Of the differences between two runs: how many are shown, and with how many letters of each value.
_SHOWN = 6
_LETTERS = 80
# Keys of a model's configuration that change nothing that is computed.
_NOT_COMPUTED_WITH = (internals.LOADED_FROM, "transformers_version")
# Formats of a journal, of which a run has one (`journal_format`). A run that an older version has begun can resume only
# if its format is the same. So it is a newer one only if the run computes or records something else than before.
_FORMAT = 10
# Since 11, experts are chosen and refitted in another way, and the last record has the mixtures of layers that predict
# more tokens. Since 12, experts are refitted to several texts only. Since 13, a quantized mixture stays quantized if
# nothing is refitted.
_FORMAT_WITH_REMOVED_EXPERTS = 13
# Since 14, the method "obs_admm" takes fewer iterations, and zeros are shared by gradients on the beginnings of
# sequences. Since 15, the refit of "obs_admm" takes fewer steps, and its rounded products are others.
_FORMAT_OF_DEFAULT = 15
# Options that older versions did not have; None if the user does not set them.
_LATER_OPTIONS = ("keep_divisible",)


def run_fingerprint(
    source: SourceFiles,
    plan: Plan,
    batches: Sequence[CalibrationBatch],
    report: PruningReport,
    packed: bool,
) -> dict[str, Any]:
    """Collect everything that the bytes of a run depend on: weights, configurations, arithmetic, tokens, versions.

    `source` has the digests of the files of the model, and `batches` are those of the calibration. `report` is the one
    that `batches.read_calibration` has begun: its environment, configuration and calibration count. `packed` says
    whether the result is stored without zeros. Changes nothing. The values are plain, as JSON gives them.
    """
    shapes = [list(batch.input_ids.shape) for batch in batches]  # [sequences, tokens] each
    versions = library_versions()
    calibration = report.calibration
    tokens = calibration["sha256"]
    if "held_out" in calibration:
        tokens = [tokens, calibration["held_out"]["sha256"]]
    # All values of the configuration, also those that are the defaults of this version of Transformers.
    model_config = json.loads(plan.layers.model.config.to_json_string(use_diff=False))
    # Digests of files and tokens, and everything else as it is, so that a message can say what differs.
    fingerprint = {
        "journal": journal_format(plan.config, removes_experts=bool(plan.removal.mixtures)),
        "weights": {name: digest for name, digest in source.digests.items() if name != CONFIG_FILE},
        "model_config": {
            key: value for key, value in model_config.items() if key not in _NOT_COMPUTED_WITH
        },
        "arithmetic": {
            key: value
            for key, value in report.environment.items()
            if key not in ("processor", "batches")
        },
        "config": _config_that_counts(report.config),
        "calibration": tokens,
        "batches": shapes,
        "sequences": sum(shape[0] for shape in shapes),
        "length": shapes[0][1],  # tokens in a sequence of the first batch
        "packed": packed,
        "versions": {name: versions[name] for name in ("optimum-fista", "torch", "transformers")},
    }
    sources = sources_of(batches)
    if len(sources) > 1:
        # The number of the text of each batch: what is tested by text depends on it.
        fingerprint["sources"] = [sources.index(batch.source) for batch in batches]
    # Through JSON, as it will be read from disk: tuples become lists, for instance.
    return dict(json.loads(json.dumps(fingerprint)))


def journal_format(config: FistaPruningConfig, *, removes_experts: bool) -> int:
    """Return the format of the journal of a run with a configuration, which is resolved.

    It is the newest format in which something is new that the run does.
    """
    formats = [_FORMAT]
    if removes_experts:
        formats.append(_FORMAT_WITH_REMOVED_EXPERTS)
    if config.method == "obs_admm" or config.allocation == "fisher":
        formats.append(_FORMAT_OF_DEFAULT)
    return max(formats)


def _config_that_counts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the configuration of a run, as a report has it, without options that came later and are not set.

    So a run that an older version has begun, without these options, can resume.
    """
    return {
        name: value
        for name, value in config.items()
        if name not in _LATER_OPTIONS or value is not None
    }


def join_run(folder: Path, fingerprint: Mapping[str, Any], overwrite: bool, ranks: Ranks) -> None:
    """Have rank 0 resume the run of a locked unfinished folder, and refuse ranks that were started for another run.

    `folder` is the unfinished folder, and `fingerprint` is that of this process (`run_fingerprint`). If the folder
    holds another run, `overwrite` deletes the files of that run; otherwise this is a ValueError.
    """
    # run in rank 0, and returned in all
    of_rank_0 = ranks.first(lambda: _begin_or_resume(folder, fingerprint, overwrite=overwrite))
    # run in all; if one fails, all raise an error
    ranks.each(lambda: _require_fingerprint_of_rank_0(fingerprint, of_rank_0))


def _begin_or_resume(
    folder: Path, fingerprint: Mapping[str, Any], *, overwrite: bool
) -> Mapping[str, Any]:
    """Empty an unfinished folder, unless it holds the run with this fingerprint, and return the fingerprint.

    Without `overwrite`, a folder that holds another run is refused (ValueError).
    """
    begun = read_record(folder / RUN_FILE)
    if overwrite:
        # Compared as text, because the order of overrides counts, too.
        is_same = json.dumps(begun) == json.dumps(fingerprint)
    else:
        # A run on one text has no such entry: then it is an entry of the other run that differs.
        require_same_run(folder, {"sources": None, **fingerprint})
        is_same = begun is not None
    # A folder without a fingerprint is emptied, too: a process may have been killed while it discarded a run.
    if not is_same:
        # Text that a model has written for the calibration stays: this run may have written it just before.
        discard(folder, keep_texts=True)
    return fingerprint


def _require_fingerprint_of_rank_0(
    fingerprint: Mapping[str, Any], of_rank_0: Mapping[str, Any]
) -> None:
    """Refuse this process (ValueError) if its fingerprint is not that of rank 0."""
    different = [
        key
        for key in {**of_rank_0, **fingerprint}  # of all keys, each once
        if fingerprint.get(key) != of_rank_0.get(key)
    ]
    if different:
        raise ValueError(
            f"{' and '.join(different)} differ from those of rank 0: start every process with the same model, "
            "options and calibration text."
        )


def require_same_run(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse an unfinished folder of another run (ValueError); one without a run is accepted. Changes nothing.

    `wanted` are the entries of this run's fingerprint that are known (`run_fingerprint`); only these are compared.
    """
    run_file = folder / RUN_FILE
    if not run_file.exists():
        return
    begun = read_record(run_file)
    if begun is None:
        raise ValueError(
            f"output: {str(run_file)!r} is damaged, so it is not known which run it belongs to: pass another folder, "
            "or pass overwrite=True (--overwrite) to throw its layers away."
        )
    different_keys = [key for key in wanted if begun.get(key) != wanted[key]]
    has_same_options = _options_of_any_version(begun) == _options_of_any_version(wanted)
    has_same_data = set(different_keys) <= {"journal", "config"}
    if "journal" in different_keys and has_same_options and has_same_data:
        raise ValueError(
            f"output: the unfinished run in {str(folder)!r} was begun by an older version of optimum-fista, which "
            "computes it in another way: end it with that version, pass another folder, or pass overwrite=True "
            "(--overwrite) to throw its layers away."
        )
    different = list(_differences({key: begun.get(key) for key in wanted}, wanted))
    if different:
        differences = "; ".join(different[:_SHOWN])
        if len(different) > _SHOWN:
            differences += "; ..."
        raise ValueError(
            f"output: the unfinished run in {str(folder)!r} was another one ({differences}). Start it again as it was, "
            "pass another folder, or pass overwrite=True (--overwrite) to throw its layers away."
        )


def _options_of_any_version(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in a fingerprint that do not depend on the version; empty if it has no configuration.

    An older version lacks options that came later, and chose another number of tokens for gradients.
    """
    options = fingerprint.get("config") or {}
    return {
        name: value
        for name, value in options.items()
        if value is not None and name != "allocation_tokens"
    }


def begun_batch_size(folder: Path) -> int | None:
    """Return how many sequences the largest batch of the run in an unfinished folder has; `None` if there is no run.

    The fingerprint of the run, which the folder holds, has the shapes of its batches.
    """
    fingerprint = read_record(folder / RUN_FILE)
    if fingerprint is None:
        return None
    shapes = fingerprint.get("batches", [])  # [sequences, tokens] each
    return max((shape[0] for shape in shapes), default=None)


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Say in words what differs between two dictionaries of dictionaries, one message for each value.

    `before` and `now` are fingerprints, or dictionaries inside of them. `prefix` is what the keys in the messages begin
    with, such as "config.".
    """
    for key in {**before, **now}:  # all keys, in the order of the first dictionary
        old = before.get(key)
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            # Dictionaries with the same entries in another order differ: the first matching override counts.
            is_reordered = old == new and [*old] != [*new]
            if not is_reordered:
                yield from _differences(old, new, f"{prefix}{key}.")
                continue
        elif old == new:
            continue
        yield f"{prefix}{key} was {_shortened(old)}, is {_shortened(new)}"


def _shortened(value: Any) -> str:
    """Write a value as JSON; a long one loses its end."""
    text = json.dumps(value)
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]}..."
