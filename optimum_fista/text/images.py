"""Calibration sequences with images: one for each line of a `.jsonl` file, as the model's processor makes them."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedConfig
from transformers.image_utils import load_image

from optimum_fista.model.media import cut_sequence
from optimum_fista.text.text_source import TextSource

logger = logging.getLogger(__name__)


def image_sequences(
    processor: Any,
    config: PreTrainedConfig,
    text: TextSource,
    num_samples: int,
    length: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Make `num_samples` batches of one sequence, of lines in random order, each with its images.

    A batch has the arguments of the model by name: `input_ids`, int64 [1, tokens], `attention_mask`, `pixel_values`,
    and what else the processor makes. A sequence is cut at `length` tokens. If tokens of an image come after that, the
    line is skipped; a warning gives the number of skipped lines. ValueError if too few lines are left. The global
    random state stays as it is.

    Args:
        processor: That of the model: it makes the arguments of the model from a text and its images.
        config: The model's configuration, which names the tokens of images.
        text: Lines of a `.jsonl` file (`text.documents`), and the image files of each line (`text.images`).
        num_samples: Lines that are needed.
        length: Tokens of a sequence, at most.
        seed: Decides the order of the lines.
    """
    num_lines = len(text.documents)
    if num_lines < num_samples:
        raise ValueError(
            f"text {text.name!r} has {num_lines} lines, and num_samples={num_samples} needs as many: pass "
            f"num_samples={num_lines}, or more lines."
        )

    batches = list[dict[str, Any]]()
    num_skipped = 0
    longest_skipped = 0  # tokens
    order = torch.randperm(num_lines, generator=torch.Generator().manual_seed(seed)).tolist()
    for number in order:
        if len(batches) == num_samples:
            break
        batch = _sequence(processor, text.documents[number], text.images[number])
        cut = cut_sequence(batch, length, config)  # None: tokens of an image would be cut
        if cut is None:
            num_skipped += 1
            longest_skipped = max(longest_skipped, batch["input_ids"].shape[1])
        else:
            batches.append(cut)

    if len(batches) < num_samples:
        raise ValueError(
            f"text {text.name!r} has {num_lines} lines, of which {num_skipped} have tokens of an image after token "
            f"{length} (--sequence-length; the longest has {longest_skipped}), and num_samples={num_samples} needs as "
            f"many: pass num_samples={num_lines - num_skipped}, or more lines."
        )
    if num_skipped:
        logger.warning(
            "%d lines of %s are skipped: %d have tokens of an image after token %d (--sequence-length; the longest "
            "has %d)",
            num_skipped,
            text.name,
            num_skipped,
            length,
            longest_skipped,
        )
    return batches


def _sequence(processor: Any, text: str, files: Sequence[Path]) -> dict[str, Any]:
    """Run the processor on one text and its images; if the text does not say where they are, the chat template does.

    `files` are the image files, which are read. Returns the arguments of the model: `input_ids`, int64 [1, tokens],
    `attention_mask`, `pixel_values`, ... ValueError if the processor refuses the text, or a file can't be read.
    """
    marks = list[str]()  # texts that stand for an image, such as "<image>"
    for name in ("image_token", "boi_token"):  # attributes that some processors have
        mark = getattr(processor, name, None)
        if isinstance(mark, str):
            marks.append(mark)
    says_where = any(mark in text for mark in marks)
    options: dict[str, Any] = {}  # further arguments of the processor
    if not says_where:
        if processor.chat_template:
            text = _prompt(processor, text, len(files), marks)
            bos = processor.tokenizer.bos_token
            template_writes_bos = bool(bos) and text.startswith(bos)
            if template_writes_bos:
                options["add_special_tokens"] = False  # no second BOS
        elif files:
            shown = " or ".join(marks) or "its image token"
            raise ValueError(
                f"the model's processor has no chat template: write {shown} into every text with an image, also into "
                f"{text[:60]!r}."
            )

    try:
        images = None
        if files:
            # A list for each text, and there is one text.
            images = [[load_image(str(file)) for file in files]]
        return dict(processor(text=[text], images=images, return_tensors="pt", **options))
    except (OSError, ValueError) as error:
        # a damaged file, or more images than the text has places for
        shown = ", ".join(map(str, files)) if files else "no image"
        raise ValueError(
            f"the model's processor can't read {text[:60]!r} with {shown}: {error}"
        ) from error


def _prompt(processor: Any, text: str, num_images: int, marks: Sequence[str]) -> str:
    """Write a user's turn with images before a text by the chat template of a processor, and return it.

    Some templates take the content of a turn as a string only: they fail on a list of parts, or print the list. Then
    the images are written into the string as the first of `marks`, the image tokens of the processor. ValueError if it
    has none. Changes nothing.
    """

    def write(content: str | list[dict[str, str]]) -> str:
        """Run the chat template of `processor` on one turn of a user with this content."""
        turns = [{"role": "user", "content": content}]
        prompt: str = processor.apply_chat_template(turns, tokenize=False)
        return prompt

    parts = [{"type": "image"} for _ in range(num_images)] + [{"type": "text", "text": text}]
    with suppress(TypeError, TemplateError):  # these come from templates that take only strings
        prompt = write(parts)
        prints_the_list = str(parts) in prompt
        if not prints_the_list:
            return prompt

    if num_images and not marks:
        raise ValueError(
            "the chat template of the model's processor takes only strings, and the processor names no image token: "
            f"write its image token into every text with an image, also into {text[:60]!r}."
        )
    lines = [marks[0] for _ in range(num_images)] + [text]
    return write("\n".join(lines))
