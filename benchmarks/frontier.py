"""What to remove first: bits per byte of held-out text against megabytes and against time, in a table and a picture.

A variant is `dense`, a pattern, or patterns joined by `_`, each pruned in a run of its own. It is recovered on so many
`--tokens`, and so is the dense model, to compare. With `--label-share 1` all are trained on the text alone, without a
teacher.

Each is then measured in `--formats`:

- a number of bits a weight, or IQ4_NL, llama.cpp's best 4 bits in blocks of 32 (`llama_cpp.py`). The head has 8 bits at
  least, but for IQ4_NL*. Weights are rounded as llama.cpp stores them, and Transformers measures the model
- `packed` for zeros: the bytes of a packed folder. It has no times, since it is loaded as a dense model

Of every text, the first `--bytes` are measured, whatever the vocabulary: windows share one token, so that all tokens
but the first of a text are predicted. Sizes are those of the weights, without tokenizers.

    python benchmarks/frontier.py MODEL --calibration TEXT --texts TEXT1,TEXT2 --work runs/frontier --plot FILE.png

The same call resumes: rows in `--output` are not measured again. With `--rounds 5` it also takes the times of all rows
of a Llama or Gemma 3 in turn, with llama.cpp (`pip install xllamacpp`); close other programs before. Times are of 1,000
characters of the texts, since a smaller vocabulary needs more tokens. They depend on shapes and formats alone, so
recovered models are as fast as those that they were made from.
"""

from __future__ import annotations

import math
import shlex
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from ablations import geometric_mean
from llama_cpp import generate, kind_of, rounded, server_of, write_gguf
from shared import open_record, parse_arguments, save, sparsity_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.cli.main import main as optimum_fista
from optimum_fista.environment import processor_name
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.folder.card import markdown_lines
from optimum_fista.folder.packed_folder import pack_folder
from optimum_fista.source.loading import load_model, read_config
from optimum_fista.text.sources import load_text

Row = dict[str, Any]
VARIANTS = (
    "dense vocab:0.29 channels:0.1 channels:0.2 channels:0.3 layers:0.2 vocab:0.29_channels:0.2 0.5"
)
# Of the marks in the picture, the same for all models; other formats share a cross.
SHAPES = {"16": "s", "8": "o", "5": "v", "4": "^", "IQ4_NL": "D", "IQ4_NL*": "P", "packed": "*"}
# What is timed: the numbers of prompts, of their tokens, and of new tokens.
TIMES = {
    "prefill": (1, 512, 1),
    "decode": (1, 16, 32),
    "batch 16": (16, 16, 32),
}


def made(arguments: Namespace, variant: str, tokens: int) -> tuple[Path, list[str], float]:
    """Return the folder of a variant, its commands, and the processor minutes of the last one.

    A folder that is not there is made in `arguments.work`. `variant` is "dense" or patterns joined by "_", and each of
    these is a run; `tokens` are what the result is recovered on, 0 if it is not.
    """
    patterns = [] if variant == "dense" else variant.split("_")
    common = ["--seed", str(arguments.seed), "--device", "cpu"]
    for source in arguments.calibration.split(","):
        common += ["--calibration", source]
    sizes = ["--num-samples", str(arguments.num_samples)]
    sizes += ["--sequence-length", str(arguments.sequence_length)]

    folder = Path(arguments.model)
    name = folder.name
    steps: list[tuple[list[str], Path]] = []  # words of a command, and the folder that it makes
    for pattern in patterns:
        option = "--pattern" if sparsity_of(pattern) is None else "--sparsity"
        words = ["prune", str(folder), option, pattern, "--dtype", "bfloat16"]
        if not pattern.startswith("vocab:"):  # such a run counts whole texts
            words += sizes
        name += f"-{pattern}".replace(":", "-")
        folder = arguments.work / name
        steps.append(([*words, *common, "--output", str(folder)], folder))
    if tokens:
        words = ["recover", str(folder), "--teacher", arguments.model, "--tokens", str(tokens)]
        name += f"-{tokens}"
        if arguments.label_share is not None:
            words += ["--label-share", arguments.label_share]
            name += f"-labels-{arguments.label_share}"
        folder = arguments.work / name
        steps.append(([*words, *common, "--output", str(folder)], folder))

    commands = []
    minutes = 0.0
    for words, made_folder in steps:
        if not made_folder.exists():
            started = time.process_time()
            if optimum_fista(words):
                raise SystemExit(f"optimum-fista {shlex.join(words)} failed.")
            minutes = (time.process_time() - started) / 60
        shown = [Path(word).name if "/" in word else word for word in words]
        commands.append(shlex.join(["optimum-fista", *shown]))
    return folder, commands, minutes


def round_weights(model: PreTrainedModel, bits: str) -> int:
    """Round the weights of a model in place as llama.cpp stores them; returns the bytes that they take.

    Vectors and the routers of a mixture stay in float32.
    """
    num_bytes = 0
    head = model.get_output_embeddings().weight
    for name, weight in model.named_parameters():  # tied ones once
        # Ernie's routers have a bias of two dimensions, mlp.gate.moe_statics.e_score_correction_bias.
        is_of_router = "gate" in name.split(".")
        if is_of_router or weight.ndim == 1:
            num_bytes += 4 * weight.numel()
            continue
        kind = kind_of(bits, weight.shape, weight is head)
        block, bytes_of_block = gguf.GGML_QUANT_SIZES[kind]
        num_bytes += weight.numel() // block * bytes_of_block
        # The rows of all experts, if the weight is a stack of their matrices.
        rows = weight.data.flatten(0, -2)
        values = gguf.dequantize(rounded(name, rows, kind), kind)
        weight.data.copy_(torch.from_numpy(values).view(weight.shape))
    return num_bytes


def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, length: int
) -> float:
    """Measure the bits per byte of a whole text in windows of `length`; every token but the first is predicted."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    # neighbours share one token
    windows = [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]
    whole_windows = torch.stack(windows[:-1])
    last_window = windows[-1].unsqueeze(0)  # which may be shorter
    bits = 0.0
    for group in (whole_windows, last_window):
        measured = evaluate_perplexity(model, group, batch_size=4, progress=False)
        bits += math.log2(measured.perplexity) * measured.num_tokens
    return bits / len(text.encode())


def starts_of(arguments: Namespace) -> dict[str, str]:
    """Return the first `--bytes` of every text, by its name."""
    starts = {}
    for source in arguments.texts:
        text = load_text(source, "test").joined.encode()
        # the last character may be cut
        starts[Path(source).stem] = text[: arguments.bytes].decode(errors="ignore")
    return starts


def measure(arguments: Namespace, key: Row, texts: dict[str, str]) -> Row:
    """Make a row: a variant, pruned and maybe recovered, in one format; `key` says which, and is not changed."""
    folder, commands, minutes = made(arguments, key["variant"], key["tokens"])
    model, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    row = key | {"commands": commands, "minutes": minutes, "parameters": model.num_parameters()}
    if key["format"] == "packed":
        with tempfile.TemporaryDirectory() as temporary:
            packed = Path(temporary) / "packed"
            pack_folder(folder, packed)
            row["bytes"] = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    else:
        row["bytes"] = round_weights(model, key["format"])

    num_tokens = sum(len(ids) for ids in tokenizer([*texts.values()]).input_ids)
    row["tokens_per_character"] = num_tokens / sum(len(text) for text in texts.values())
    with torch.autocast("cpu", torch.bfloat16):
        row["bits_per_byte"] = {
            name: bits_per_byte(model, tokenizer, text, arguments.sequence_length)
            for name, text in texts.items()
        }
    row["mean"] = geometric_mean(row["bits_per_byte"].values())
    return row


def is_measured(key: Row, rows: Sequence[Row]) -> bool:
    """Tell whether one of the rows has all values of `key`; an entry that an older row lacks counts as `None`."""
    for row in rows:
        values = {name: row.get(name) for name in key}
        if values == key:
            return True
    return False


def seconds(model: Any, prompts: torch.Tensor, new_tokens: int) -> float:
    """Seconds of so many new tokens after each prompt; one new token is the prefill."""
    started = time.perf_counter()
    generate(model, prompts, new_tokens)
    return time.perf_counter() - started


def take_times(arguments: Namespace, rows: Sequence[Row]) -> None:
    """Add the milliseconds of a token to rows, measured in turn; all models are in memory together."""
    folders = [made(arguments, row["variant"], 0)[0] for row in rows]
    entries = min(read_config(str(folder)).vocab_size for folder in folders)
    generator = torch.Generator().manual_seed(0)
    questions = {}  # prompts, int64 [prompts, tokens], and the number of new tokens
    for name, (prompts, length, new) in TIMES.items():
        questions[name] = (torch.randint(entries, (prompts, length), generator=generator), new)

    models: list[Any] = []
    with tempfile.TemporaryDirectory() as temporary:
        for row, folder in zip(rows, folders, strict=True):
            file = Path(temporary) / str(len(models))
            write_gguf(folder, file, row["format"])
            models.append(server_of(file, arguments.threads, parallel=16))
            row["seconds"] = {name: [] for name in TIMES}
        for turn in range(arguments.rounds + 1):
            is_warming_up = turn == 0
            for row, model in zip(rows, models, strict=True):
                for name, question in questions.items():
                    took = seconds(model, *question)
                    if not is_warming_up:
                        row["seconds"][name].append(took)

    for row in rows:
        row["ms_a_token"] = {}
        for name, times in row["seconds"].items():
            prompts, length, new = TIMES[name]
            # a prefill counts the tokens of the prompt, the others the new ones
            num_tokens = prompts * (length if name == "prefill" else new)
            row["ms_a_token"][name] = 1e3 * statistics.median(times) / num_tokens


def frontier(points: dict[int, tuple[float, float]]) -> list[int]:
    """Of points (cost, loss), return those with a lower loss than all that cost less, by rising cost."""
    best = math.inf
    indices = []
    for index in sorted(points, key=lambda i: points[i]):
        _, loss = points[index]
        if loss < best:
            best = loss
            indices.append(index)
    return indices


def points_of(rows: Sequence[Row]) -> dict[str, dict[int, tuple[float, float]]]:
    """Return cost and loss of the rows, by what is counted and by the number of the row.

    What is counted are megabytes, and milliseconds for 1,000 characters of the texts. Rows of a variant and a format
    are as fast as the one that was timed, if one was.
    """
    points = {"megabytes": {i: (row["bytes"] / 1e6, row["mean"]) for i, row in enumerate(rows)}}
    times_of = {
        (row["variant"], row["format"]): row["ms_a_token"] for row in rows if "ms_a_token" in row
    }
    if not times_of:
        return points
    for name in TIMES:
        points[f"{name}, ms"] = {}
        for index, row in enumerate(rows):
            times = times_of.get((row["variant"], row["format"]))
            if times is not None:
                milliseconds = 1e3 * row["tokens_per_character"] * times[name]
                points[f"{name}, ms"][index] = (milliseconds, row["mean"])
    return points


def table(rows: Sequence[Row]) -> list[str]:
    """Return the rows by megabytes, in Markdown; costs of the frontier are bold."""
    points = points_of(rows)
    best = {name: frontier(of_rows) for name, of_rows in points.items()}
    lines = []
    for index in sorted(range(len(rows)), key=lambda i: rows[i]["bytes"]):
        row = rows[index]
        costs = []
        for name, of_rows in points.items():
            cost = f"{of_rows[index][0]:.3g}" if index in of_rows else ""
            costs.append(f"**{cost}**" if index in best[name] else cost)
        losses = [f"{loss:.4f}" for loss in (row["mean"], *row["bits_per_byte"].values())]
        trained = f"{row['tokens']:,}" if row["tokens"] else ""
        if row.get("label_share") is not None:
            trained += f", label share {row['label_share']}"
        lines.append((row["variant"], trained, row["format"], *costs, *losses))
    headings = ("removed", "recovered on", "bits", *points, "mean", *rows[0]["bits_per_byte"])
    return markdown_lines(headings, lines)


def words_of(bits: str) -> str:
    """The name of a format in the picture."""
    if bits == "IQ4_NL*":
        return "all in IQ4_NL"
    if bits == "packed":
        return "16 bits, packed"
    return f"{bits} bits" if bits.isdigit() else bits


def draw(rows: Sequence[Row], file: Path, model: str) -> None:
    """Draw bits per byte against each cost, in a panel of its own, with a legend on the right.

    The title names the `model`. If there is one panel, its best marks have numbers, and the legend says what these are.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    points = points_of(rows)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    formats = dict.fromkeys(row["format"] for row in rows)
    colours = {variant: f"C{index}" for index, variant in enumerate(variants)}
    has_times = len(points) > 1
    size = 2 if has_times else 1  # panels in a row
    figure = Figure(figsize=(11, 8) if has_times else (8.5, 6.5), layout="constrained")
    figure.suptitle(f"{model}: lower is better, and so is left", fontsize=10)
    panels = figure.subplots(size, size, squeeze=False).flat
    for axes, (name, of_rows) in zip(panels, points.items(), strict=True):
        _draw_panel(axes, name, rows, of_rows, colours=colours)
    on_the_line = [] if has_times else _number_frontier(axes, rows, points["megabytes"])

    # the legend, from marks without points in the last panel
    for variant, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=variant.replace("_", " + "))
    for bits in formats:
        shape = SHAPES.get(bits, "X")
        axes.plot([], [], shape, color="black", markerfacecolor="white", label=words_of(bits))
    axes.plot([], [], "s", color="black", label="filled: trained")
    figure.legend(loc="outside right upper", fontsize=8)
    if on_the_line:
        without_marks = [Line2D([], [], linestyle="none") for _ in on_the_line]
        figure.legend(
            without_marks, on_the_line, loc="outside right lower", fontsize=8, handlelength=0
        )
    figure.savefig(file, dpi=90, metadata={"Software": None})


def _number_frontier(
    axes: Any, rows: Sequence[Row], of_rows: dict[int, tuple[float, float]]
) -> list[str]:
    """Number the marks on the line, and return what each one is; `of_rows` are the places of all rows, by number."""
    lines = []
    for number, index in enumerate(frontier(of_rows), start=1):
        row = rows[index]
        megabytes, _ = of_rows[index]
        variant = row["variant"].replace("_", " + ")
        lines.append(f"{number}  {megabytes:.0f} MB: {variant}, {words_of(row['format'])}")
        axes.annotate(
            str(number),
            of_rows[index],
            xytext=(-4, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            weight="bold",
        )
    return lines


def _draw_panel(
    axes: Any,
    name: str,
    rows: Sequence[Row],
    of_rows: dict[int, tuple[float, float]],
    *,
    colours: dict[str, str],
) -> None:
    """Draw the rows as marks, and the frontier as a line; filled marks are recovered models, shapes are formats.

    `of_rows` has cost and loss by the number of the row, and `name` is what the cost is. `colours` are by variant.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    best = [of_rows[index] for index in frontier(of_rows)]
    costs = [cost for cost, _ in best]
    losses = [loss for _, loss in best]
    axes.plot(costs, losses, color="grey", linewidth=1, zorder=0)
    for index, (cost, loss) in of_rows.items():
        colour = colours[rows[index]["variant"]]
        axes.plot(
            cost,
            loss,
            SHAPES.get(rows[index]["format"], "X"),
            color=colour,
            markerfacecolor=colour if rows[index]["tokens"] else "white",
        )
    axes.set(xlabel=name, ylabel="bits per byte", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def main() -> None:
    """Measure the rows that the output file lacks, take times if asked for, and print the table."""
    helps = {
        "variants": "what is removed",
        "calibration": "texts to calibrate and recover on, divided by commas",
        "tokens": "to recover on; 0: not recovered",
        "label_share": "of the recoveries; the default is that of optimum-fista recover",
        "bytes": "of each text",
        "formats": "bits a weight",
        "work": "folder for models",
        "rounds": "of times, in turn; 0: none",
        "title": "name of the model in the picture",
    }
    arguments = parse_arguments(
        __doc__,
        "model",
        "calibration",
        "texts",
        helps=helps,
        variants=VARIANTS.split(),
        tokens=[0],
        label_share=str,
        formats=["16", "8", "IQ4_NL"],
        num_samples=16,
        sequence_length=512,
        bytes=60_000,
        seed=0,
        threads=1,
        rounds=0,
        work=Path("runs"),
        output=Path("runs/frontier.json"),
        plot=Path,
        title=str,
    )
    torch.set_num_threads(arguments.threads)
    texts = starts_of(arguments)
    record = open_record(
        arguments,
        "variants",
        "tokens",
        "label_share",
        "formats",
        "work",
        "threads",
        "rounds",
        "seed",
    )
    for variant in arguments.variants:
        sets_zeros = sparsity_of(variant) is not None
        formats = ["packed"] if sets_zeros else arguments.formats
        for tokens in arguments.tokens:
            for bits in formats:
                key: Row = {
                    "model": Path(arguments.model).name,
                    "variant": variant,
                    "tokens": tokens,
                    "format": bits,
                    "seed": arguments.seed,
                    "label_share": arguments.label_share if tokens else None,
                }
                if not is_measured(key, record["rows"]):
                    record["rows"].append(measure(arguments, key, texts))
                    save(arguments, record)
    if arguments.rounds:
        timed = [row for row in record["rows"] if not row["tokens"] and row["format"] != "packed"]
        take_times(arguments, timed)
        machine = {"processor": processor_name(), "threads": arguments.threads}
        save(arguments, record | {"machine": machine})
    print("\n".join(table(record["rows"])))
    if arguments.plot is not None:
        draw(record["rows"], arguments.plot, arguments.title or record["rows"][0]["model"])


if __name__ == "__main__":
    main()
