"""The model card of a pruned model, and its picture of the fit errors."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from optimum_fista.run.reports.markdown import markdown_lines
from optimum_fista.run.reports.operator_grid import OperatorGrid, layer_index
from optimum_fista.run.reports.report import OperatorReport, PruningReport
from optimum_fista.solve.pattern import SparsityPattern
from optimum_fista.solve.patterns import parse_pattern

_TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- optimum-fista
- pruned
- sparse
{base}---

# {title}

Pruned after training, in one shot and {retraining}, by
[optimum-fista](https://pypi.org/project/optimum-fista/) {version}: {num_zeros:,} of the {num_weights:,} weights of
its decoder layers' linear operators are zero ({sparsity:.2%}; {model_sparsity:.2%} of all parameters). Embeddings and
the language-model head are dense.

| | |
|---|---|
| pattern | {pattern} |
| method | {method}; error correction `{error_correction}`, residual correction `{residual_correction}` |
| zeros | {allocation} |
| fit error of the operators{before} | {mean_fit_error:.4f} on average, {max_fit_error:.4f} at most |
| output error of the operators{before} | {output} |
{held_out}| calibration | {calibration} |
| time | {seconds:.0f} s, of which solving {solve_seconds:.0f} s |

It is a plain dense checkpoint with zeros in it and loads without any further package:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS-REPOSITORY-OR-FOLDER")
```

`fista/masks.safetensors` holds the masks (one bit a weight, row-major, lowest bit first, 1 = kept),
`fista/report.json` every operator's numbers; `optimum-fista verify FOLDER` proves the pattern from the files.

## Errors by operator{before}

On the calibration tokens, over the decoder layers. Fit error: `|| W* X* - Y ||_F / || Y ||_F`, against the outputs `Y`
that the weights were fitted to. Output error: `|| W* X* - W X ||_F / || W X ||_F`, against the dense network's outputs.
`X` are an operator's inputs in the dense network, `X*` those in the pruned one.

{picture}{rows}

## To make it again

```json
{config}
```

Calibration tokens: SHA-256 `{sha256}`. Versions: {versions}.
"""


PACKED_NOTE = """
## Packed

The pruned weights of this folder are stored without their zeros. `import optimum_fista` (`pip install optimum-fista`)
before `from_pretrained` loads it as a dense model, bit for bit; `optimum-fista unpack` writes that as a plain folder.
"""


def model_card(report: PruningReport, picture: str | None = None) -> str:
    """Markdown of the model card, with the metadata the Hub reads.

    Args:
        report: The report of the pruning.
        picture: Path of the picture of the fit errors, relative to the card; `None`: there is none.
    """
    name = report.model["name"]
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    config = report.config
    tokens = report.calibration
    return _TEMPLATE.format(
        base=f"base_model: {name}\n" if is_hub_id else "",
        title=_escaped(model_title(report)),
        version=report.versions["optimum-fista"],
        retraining=_retraining(report),
        before=report.before,
        pattern=_pattern(report),
        method=config["method"],
        error_correction=config["error_correction"],
        residual_correction=config["residual_correction"],
        allocation=_allocation(report),
        calibration=f"{tokens['num_tokens']:,} tokens in {tokens['num_sequences']} sequences"
        + (f" of {_escaped(tokens['source'])}" if tokens.get("source") else ""),
        output=_outputs(report.totals),
        held_out=_held_out(report),
        seconds=report.seconds.get("total", 0.0),
        picture=f"![Fit error by decoder layer and operator]({picture})\n\n" if picture else "",
        rows="\n".join(_rows(report.operators)),
        config=json.dumps(config, indent=2),
        sha256=tokens["sha256"],
        versions=", ".join(f"{key} {value}" for key, value in report.versions.items()),
        **report.totals,
    )


def model_title(report: PruningReport) -> str:
    """The name of the dense model and the sparsity pattern."""
    return f"{(report.model['name'].split('/')[-1] or report.model['class'])}, {_pattern(report)}"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*{}\[\]<>|~$&]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def _retraining(report: PruningReport) -> str:
    if report.retrained:
        return "then retrained under its masks"
    return "with every decoder layer fine-tuned under its masks" if report.finetuned else "without retraining"


def _pattern(report: PruningReport) -> SparsityPattern:
    return parse_pattern(report.config["pattern"], report.config["sparsity"])


def _allocation(report: PruningReport) -> str:
    sparsities = [o.sparsity for o in report.operators]
    if report.config["allocation"] != "fisher" or _pattern(report).fixed:
        return "the same share in every operator"
    return f"shared over the operators by gradients of the loss, {min(sparsities):.1%} to {max(sparsities):.1%}"


def _rows(operators: list[OperatorReport]) -> list[str]:
    """One row for the operators of the same kind in every decoder layer, below a header."""
    grid = OperatorGrid.of(operators)
    measured = any(o.held_out_fit_error is not None for o in operators)
    header = ["operator", "shape", "sparsity", "mean fit error", "largest fit error", "mean output error"]
    header += ["mean held-out fit error"] if measured else []
    rows = []
    for kind in grid.kinds:
        group = grid.of_kind(kind)
        errors = [o.fit_error for o in group]
        outputs = [o.output_error for o in group if o.output_error is not None]
        held_out = [o.held_out_fit_error for o in group if o.held_out_fit_error is not None]
        sparsity = sum(o.sparsity for o in group) / len(group)
        shape = " x ".join(map(str, group[0].shape))
        cells = [kind, shape, f"{sparsity:.2%}", f"{fmean(errors):.4f}", f"{max(errors):.4f}"]
        cells.append(f"{fmean(outputs):.4f}" if outputs else "not known")
        if measured:
            cells.append(f"{fmean(held_out):.4f}" if held_out else "")
        rows.append(cells)
    return markdown_lines(header, rows)


def _outputs(totals: Mapping[str, Any]) -> str:
    """The output errors; without a dense pass they are not known."""
    if totals["mean_output_error"] is None:
        return "not known: nothing was corrected, so the dense network did not run"
    return f"{totals['mean_output_error']:.4f} on average, {totals['max_output_error']:.4f} at most"


def _held_out(report: PruningReport) -> str:
    """The line of the held-out errors; empty without any."""
    totals = report.totals
    if totals["held_out_ratio"] is None:
        return ""
    tokens = report.calibration["held_out"]
    return (
        f"| fit error on held-out tokens | {totals['mean_held_out_fit_error']:.4f} on average, "
        f"{totals['max_held_out_fit_error']:.4f} at most, on {tokens['num_tokens']:,} tokens in "
        f"{tokens['num_sequences']} further sequences |\n"
    )


PICTURE_FILE = "fista/relative_error.png"


def error_picture(report: PruningReport) -> bytes | None:
    """Draw the mean fit error by decoder layer and kind of operator as a heat map, PNG.

    Equal reports give equal bytes under one version of Matplotlib.

    Returns:
        The file's bytes; `None` if Matplotlib (extra `plots`) is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    grid = OperatorGrid.of(report.operators)
    values = [[_mean(grid, layer, kind) for kind in grid.kinds] for layer in grid.layers]
    size = (2.2 + 0.75 * len(grid.kinds), 2.0 + 0.16 * len(grid.layers))
    with rc_context({"font.family": "DejaVu Sans", "font.size": 8}):  # comes with Matplotlib
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        axes = figure.subplots()
        image = axes.imshow(values, aspect="auto", cmap="cividis_r", vmin=0)
        axes.set_xticks(range(len(grid.kinds)), grid.kinds, rotation=40, ha="right", rotation_mode="anchor")
        every = math.ceil(len(grid.layers) / 16)
        axes.set_yticks(range(0, len(grid.layers), every), [str(layer_index(la)) for la in grid.layers[::every]])
        axes.set(ylabel="decoder layer", title="fit error")
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.8)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _mean(grid: OperatorGrid, layer: str, kind: str) -> float:
    errors = [operator.fit_error for operator in grid.cells.get((layer, kind), ())]
    return sum(errors) / len(errors) if errors else math.nan
