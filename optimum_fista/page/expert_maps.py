"""Maps of the experts that routers choose on each text, for the page: which were removed, and which text used them.

`expert_maps` makes a map of each text. Its rows are mixtures, from the first decoder layer to the last. On the left of
a row are the experts that stayed, on the right those that were removed. The colour of an expert is of its *relative
share*: the number of tokens of the text that the router sends to the expert, divided by the mean of all experts.

The numbers of experts say nothing: expert 5 of one decoder layer has nothing to do with expert 5 of the next one. So
the experts of a row are sorted by the text that uses them most. All maps have the same order, and an expert is in the
same place in each. Of a mixture with many experts, neighbours share a cell, which has their mean.

A cell is a stroke in a path of SVG, one path for each colour, so that a map of 48 layers with 512 experts each takes
about 20 kB. No function changes the report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from optimum_fista.headlines import share
from optimum_fista.records import MixtureReport
from optimum_fista.report import PruningReport

COLOURS = 9  # style.css has them; the one in the middle is that of equal shares
_MOST_CELLS = 64  # of a row: on a phone, a cell is 5 pixels wide
_MOST_MAPS = 12
_GAP = 0.03  # between the experts that stayed and the others, as a share of the width


@dataclass(frozen=True)
class UsedText:
    """How many tokens of one text the router of each mixture sends to each of its experts."""

    name: str
    # Whether the run was calibrated on it; otherwise it was only measured.
    is_calibration: bool
    # Of each mixture, in the order of the report.
    expert_tokens: Sequence[Sequence[int]]


@dataclass(frozen=True)
class ExpertMap:
    """The map of one text, with what a reader should see in it."""

    text: str
    is_calibration: bool
    # Shares of the router's choices that fell on removed experts, as text: in all mixtures together, and in the mixture
    # where it was most, with the number of its decoder layer.
    removed_share: str
    highest_share: str
    highest_layer: str
    # The data of a path of SVG, by the number of its colour.
    paths: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class ExpertMaps:
    """The maps of all texts, and the measures that they have in common."""

    maps: Sequence[ExpertMap]
    # Texts that have no map, because there would be too many.
    num_left_out: int
    # In cells; a row is one cell high.
    width: float
    num_rows: int
    # Pixels of a row: few if there are many rows.
    row_height: int
    # Where the removed experts begin, as a share of the width in percent.
    removed_begin: float
    # Names of the first and the last decoder layer, such as "3".
    first_layer: str
    last_layer: str
    # How many experts have one cell, at most.
    experts_in_a_cell: int


@dataclass(frozen=True)
class _Row:
    """The cells of one mixture: the mean of the relative shares of the experts in each, for each text."""

    kept: Sequence[Sequence[float]]  # by text and cell
    removed: Sequence[Sequence[float]]


def expert_maps(report: PruningReport) -> ExpertMaps | None:
    """Make the maps of a run that removed experts; `None` if it removed none, or if no token is counted.

    `report.mixtures` have the numbers of tokens by expert, and those of their experts that stayed.
    """
    texts = texts_of(report)
    mixtures = report.mixtures
    if not texts:
        return None

    shown = texts[:_MOST_MAPS]
    rows = list[_Row]()
    for number, mixture in enumerate(mixtures):
        tokens_of_texts = [text.expert_tokens[number] for text in shown]
        rows.append(_row(mixture, tokens_of_texts))
    num_kept = max(len(row.kept[0]) for row in rows)
    num_removed = max(len(row.removed[0]) for row in rows)
    gap = _GAP * (num_kept + num_removed)
    layers = [layer.name.rpartition(".")[2] for layer in report.layers if layer.mixture is not None]
    largest = max(len(mixture.saliency) for mixture in mixtures)
    return ExpertMaps(
        maps=[
            _map(text, number, mixtures, layers, rows, removed_begin=num_kept + gap)
            for number, text in enumerate(shown)
        ],
        num_left_out=len(texts) - len(shown),
        width=num_kept + gap + num_removed,
        num_rows=len(rows),
        row_height=max(3, min(16, 384 // len(rows))),
        removed_begin=100 * (num_kept + gap) / (num_kept + gap + num_removed),
        first_layer=layers[0],
        last_layer=layers[-1],
        experts_in_a_cell=_experts_in_a_cell(largest),
    )


def texts_of(report: PruningReport) -> list[UsedText]:
    """List the texts of which the report has the tokens of each expert: first those of the calibration.

    Empty if the run removed no experts. A text of which a mixture lacks the numbers is left out; a report of an older
    version has only those of all calibration texts together.
    """
    if not report.mixtures:
        return []
    texts = [*_texts_of_calibration(report), *_measured_texts(report)]
    return [text for text in texts if _is_complete(text, report.mixtures)]


def _texts_of_calibration(report: PruningReport) -> list[UsedText]:
    """List the texts of the calibration; as one, if a mixture has no numbers for each."""
    sources = report.calibration.get("sources", [])
    names = [source.get("source") or "a text without a name" for source in sources]
    # by mixture, then by text, then by expert
    tokens = [mixture.tokens_of_sources for mixture in report.mixtures]
    has_each_source = bool(names) and all(len(of_texts) == len(names) for of_texts in tokens)
    if not has_each_source:
        names = [report.calibration.get("source") or "the calibration text"]
        tokens = [(mixture.expert_tokens,) for mixture in report.mixtures]
    return [
        UsedText(name, True, [of_texts[number] for of_texts in tokens])
        for number, name in enumerate(names)
    ]


def _measured_texts(report: PruningReport) -> list[UsedText]:
    """List the texts that the user named to measure on; none if a mixture lacks the numbers of one."""
    # by mixture, then by text, then by expert
    tokens = [mixture.tokens_of_texts for mixture in report.mixtures]
    if any(len(of_texts) != len(report.texts) for of_texts in tokens):
        return []
    return [
        UsedText(text.name, False, [of_texts[number] for of_texts in tokens])
        for number, text in enumerate(report.texts)
    ]


def _is_complete(text: UsedText, mixtures: Sequence[MixtureReport]) -> bool:
    """Tell whether a text has a number for each expert of each mixture; a damaged report may lack some."""
    return all(
        len(tokens) == len(mixture.saliency) > 0
        for tokens, mixture in zip(text.expert_tokens, mixtures, strict=True)
    )


def _row(mixture: MixtureReport, tokens_of_texts: Sequence[Sequence[int]]) -> _Row:
    """Sort the experts of a mixture, and put them into cells; `tokens_of_texts` are numbers by text and expert."""
    shares = [_relative_shares(tokens) for tokens in tokens_of_texts]
    num_experts = len(mixture.saliency)

    def place(expert: int) -> tuple[int, float]:
        """Sort by the text that uses the expert most, then by how much it does; `shares` are by text and expert."""
        of_texts = [shares_of_text[expert] for shares_of_text in shares]
        most = max(of_texts)
        # An expert that no text uses comes last.
        text = of_texts.index(most) if most else len(of_texts)
        return text, -most

    in_order = sorted(range(num_experts), key=place)
    stays = set(mixture.groups_kept)
    kept = [expert for expert in in_order if expert in stays]
    removed = [expert for expert in in_order if expert not in stays]

    together = _experts_in_a_cell(num_experts)
    cells_of_kept = []  # of each text
    cells_of_removed = []
    for of_text in shares:
        cells_of_kept.append(_cells([of_text[expert] for expert in kept], together))
        cells_of_removed.append(_cells([of_text[expert] for expert in removed], together))
    return _Row(kept=cells_of_kept, removed=cells_of_removed)


def _relative_shares(tokens: Sequence[int]) -> list[float]:
    """Divide the number of tokens of each expert by the mean of all; all are 0 if there are no tokens."""
    mean = sum(tokens) / len(tokens)
    return [number / mean if mean else 0.0 for number in tokens]


def _experts_in_a_cell(num_experts: int) -> int:
    """Return how many experts share a cell of a row, so that it has `_MOST_CELLS` cells or a few more."""
    return math.ceil(num_experts / _MOST_CELLS)


def _cells(values: Sequence[float], together: int) -> list[float]:
    """Return the mean of each `together` values in a row; the last cell may have fewer."""
    cells = []
    for start in range(0, len(values), together):
        of_cell = values[start : start + together]
        cells.append(sum(of_cell) / len(of_cell))
    return cells


def _map(
    text: UsedText,
    number: int,
    mixtures: Sequence[MixtureReport],
    layers: Sequence[str],
    rows: Sequence[_Row],
    *,
    removed_begin: float,
) -> ExpertMap:
    """Make the map of one text, which is the text with this number in `rows`.

    `layers` are the numbers of the decoder layers of the mixtures, as text, and `removed_begin` is where the cells of
    removed experts begin in a row.
    """
    shares = [
        _removed_share(mixture, tokens)
        for mixture, tokens in zip(mixtures, text.expert_tokens, strict=True)
    ]
    highest = max(range(len(shares)), key=lambda index: shares[index])
    return ExpertMap(
        text=text.name,
        is_calibration=text.is_calibration,
        removed_share=share(sum(shares) / len(shares)),
        highest_share=share(shares[highest]),
        highest_layer=layers[highest],
        paths=_paths(
            [(0.0, row.kept[number]) for row in rows],
            [(removed_begin, row.removed[number]) for row in rows],
        ),
    )


def _removed_share(mixture: MixtureReport, tokens: Sequence[int]) -> float:
    """Return the share of the router's choices that fell on removed experts; `tokens` are numbers by expert."""
    all_tokens = sum(tokens)
    of_kept = sum(tokens[expert] for expert in set(mixture.groups_kept) if expert < len(tokens))
    return 1 - of_kept / all_tokens if all_tokens else 0.0


def _paths(*blocks: Sequence[tuple[float, Sequence[float]]]) -> list[tuple[int, str]]:
    """Draw cells as strokes of SVG, each one unit high; returns the data of one path for each colour that is used.

    `blocks` are the cells of kept and of removed experts: of each row, where it begins and its relative shares.
    Neighbours of one colour are one stroke.
    """
    data = dict[int, list[str]]()
    for block in blocks:
        for row_number, (begin, cells) in enumerate(block):
            colours = [colour_of(relative) for relative in cells]
            start = 0
            for index in range(1, len(colours) + 1):
                is_end = index == len(colours) or colours[index] != colours[start]
                if is_end:
                    # "M": move to the left end; "h": draw to the right.
                    stroke = f"M{begin + start:g} {row_number + 0.5:g}h{index - start}"
                    data.setdefault(colours[start], []).append(stroke)
                    start = index
    return [(colour, "".join(strokes)) for colour, strokes in sorted(data.items())]


def colour_of(relative: float) -> int:
    """Return the number of the colour of a relative share: 0 for a quarter and less, 8 for 4 times and more.

    Two colours further, a share is twice as large; 1 has the colour in the middle.
    """
    middle = COLOURS // 2
    if relative <= 0:
        return 0
    steps = round(2 * math.log2(relative))
    return middle + max(-middle, min(middle, steps))
