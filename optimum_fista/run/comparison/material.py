"""Windows of a comparison: those to calibrate on and those to measure perplexity on, with their recipe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from optimum_fista.run.checkpoints.loading import read_config
from optimum_fista.run.comparison.settings import CALIBRATED, HELD_OUT, Bos, ComparisonSettings
from optimum_fista.run.texts.calibration_source import calibration_tokens_by_name, usual_length
from optimum_fista.run.texts.text import load_text
from optimum_fista.run.texts.windows import calibration_windows, evaluation_windows

_EVALUATION_BOS: dict[Bos, bool | Literal["start"] | None]
_EVALUATION_BOS = {"auto": None, "every": True, "start": "start", "none": False}
_CALIBRATION_BOS: dict[Bos, bool | None] = {"auto": None, "every": True, "start": False, "none": False}


@dataclass(frozen=True)
class Material:
    """Windows of one seed.

    Attributes:
        calibration: Token ids to calibrate on, int64 [N, T].
        texts: Token ids to measure perplexity on, by name.
        recipe: How they were made, a line each.
    """

    calibration: torch.Tensor
    texts: dict[str, torch.Tensor]
    recipe: list[str]


def prepare(
    settings: ComparisonSettings, tokenizer: PreTrainedTokenizerBase, folder: Path, progress: bool = True
) -> dict[int, Material]:
    """Cut the windows of every seed; text that the model samples itself is kept in `folder`.

    Raises:
        ValueError: If a source is unknown or too short, or two texts have the same name.
    """
    length = settings.sequence_length
    if length is None:
        length = usual_length(read_config(settings.model))
    texts: dict[str, torch.Tensor] = {}
    recipe = []
    for source in settings.texts:
        text, name = load_text(source, "test"), Path(source).stem
        if name in texts or name in (CALIBRATED, HELD_OUT):
            raise ValueError(f"texts: two are called {name!r}; rename a file.")
        whole = evaluation_windows(tokenizer, text, length, add_bos=_EVALUATION_BOS[settings.bos])
        texts[name] = whole[: settings.max_windows]
        recipe.append(
            f"Perplexity on {name}: {text.origin} (sha256 {text.sha256[:16]}), the first {len(texts[name])} of "
            f"{len(whole)} windows of {length} tokens, no overlap, {_bos_of(tokenizer, whole)}; every window is scored "
            "on its own, exp of the mean negative log-likelihood of its tokens after the first."
        )
    drawn = {}
    for seed in settings.seeds:
        windows, origin = _draw(settings, tokenizer, seed, settings.calibration_length or length, folder, progress)
        calibration, held_out = windows[: settings.num_samples], windows[settings.num_samples :]
        lines = [
            f"Calibration, seed {seed}: {settings.num_samples} random windows of {windows.shape[1]} tokens of "
            f"{origin}, {_bos_of(tokenizer, windows)}, sha256 of the tokens {windows_sha256(calibration)[:16]}."
        ]
        own = {}
        if settings.held_out:
            own = {CALIBRATED: calibration[: settings.held_out], HELD_OUT: held_out}
            lines.append(
                f"Perplexity on {HELD_OUT}: {settings.held_out} further windows of that text, not calibrated on; on "
                f"{CALIBRATED}: the first {len(own[CALIBRATED])} of those calibrated on."
            )
        drawn[seed] = Material(calibration, texts | own, [*recipe, *lines])
    return drawn


def windows_sha256(windows: torch.Tensor) -> str:
    """Digest of token ids [N, T]."""
    shape = ",".join(map(str, windows.shape)).encode()
    return hashlib.sha256(shape + windows.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def _draw(
    settings: ComparisonSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    length: int,
    folder: Path,
    progress: bool,
) -> tuple[torch.Tensor, str]:
    """Windows of one seed, to calibrate on and held out, and what they are cut from."""
    count = settings.num_samples + settings.held_out
    if settings.calibration == "self":
        places: dict[str, Any] = {
            "device": settings.device,
            "dtype": settings.dtype,
            "keep_in": folder / f"seed-{seed}",
            "progress": progress,
        }
        windows = calibration_tokens_by_name(settings.model, "self", count, length, seed, **places)
        return windows, "text that the model samples itself"
    text = load_text(settings.calibration, "calibration")
    windows = calibration_windows(tokenizer, text, count, length, seed, add_bos=_CALIBRATION_BOS[settings.bos])
    return windows, f"{text.origin} (sha256 {text.sha256[:16]})"


def _bos_of(tokenizer: PreTrainedTokenizerBase, windows: torch.Tensor) -> str:
    """Where BOS stands in windows, for people."""
    first = windows[:, 0] == (-1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    if bool(first.all()):
        return "BOS at the start of every window"
    return "BOS at the start of the text only" if bool(first[0]) else "no BOS"
