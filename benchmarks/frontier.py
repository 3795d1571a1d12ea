"""What to remove first: bits per byte of held-out text against megabytes and against time, in a table and a picture.

A variant is `dense`, a pattern, or patterns joined by `_`, each pruned in a run of its own. It is recovered on so many
`--tokens` (so is the dense model, to compare), and measured in `--formats`: bits a weight (`llama_cpp.py`; IQ4_NL is
llama.cpp's best of 4 bits in blocks of 32; the head has 8 bits at least, but for IQ4_NL*), or `packed` for zeros (the
bytes of a packed folder, which has no times: it is loaded as a dense model). Weights are rounded as llama.cpp stores
them, and Transformers then measures the model. Of every text, the first `--bytes` are measured, whatever the
vocabulary: windows share one token, so that all tokens but the first of a text are predicted. Sizes are those of the
weights, without tokenizers.

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
from functools import partial
from itertools import product
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
TIMES = {
    "prefill": (1, 512, 1),
    "decode": (1, 16, 32),
    "batch 16": (16, 16, 32),
}  # prompts, their tokens, new tokens


def made(arguments: Namespace, variant: str, tokens: int) -> tuple[Path, list[str], float]:
    """The folder of a variant, which is made if it is not there, its commands, and processor minutes of the last."""
    folder, name, commands, minutes = Path(arguments.model), Path(arguments.model).name, [], 0.0
    common = [
        "--calibration",
        arguments.calibration,
        "--seed",
        str(arguments.seed),
        "--device",
        "cpu",
        "--output",
    ]
    sizes = [
        "--num-samples",
        str(arguments.num_samples),
        "--sequence-length",
        str(arguments.sequence_length),
    ]
    if (
        variant == "dense"
    ):  # `recover` takes pruned models only: the least that can go are 64 tokens, the rarest
        variant = f"vocab:{64 / read_config(arguments.model).vocab_size:.4f}" if tokens else ""
    for step in [*filter(None, variant.split("_")), *[tokens] * bool(tokens)]:
        name += f"-{step}".replace(":", "-")
        if step == tokens:
            words = ["recover", str(folder), "--teacher", arguments.model, "--tokens", str(tokens)]
        else:
            option = "--pattern" if sparsity_of(step) is None else "--sparsity"
            words = ["prune", str(folder), option, step, *sizes, "--dtype", "bfloat16"]
        folder, started = arguments.work / name, time.process_time()
        words += [*common, str(folder)]
        if not folder.exists():
            if optimum_fista(words):
                raise SystemExit(f"optimum-fista {shlex.join(words)} failed.")
            minutes = (time.process_time() - started) / 60
        commands.append(
            shlex.join(["optimum-fista", *(Path(w).name if "/" in w else w for w in words)])
        )
    return folder, commands, minutes


def round_weights(model: PreTrainedModel, bits: str) -> int:
    """Round the weights of a model as llama.cpp stores them; returns the bytes that they take."""
    total, head = 0, model.get_output_embeddings().weight
    for name, weight in model.named_parameters():  # tied ones once
        kind = kind_of(bits, weight.shape, weight is head)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        total += weight.numel() // block * size
        if weight.ndim > 1:
            weight.data.copy_(
                torch.from_numpy(gguf.dequantize(rounded(name, weight.data, kind), kind))
            )
    return total


def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, length: int
) -> float:
    """Bits per byte of a whole text, of which every token but the first is predicted."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = [
        ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)
    ]  # they share one token
    bits = 0.0
    for group in (torch.stack(windows[:-1]), windows[-1][None]):
        found = evaluate_perplexity(model, group, batch_size=4, progress=False)
        bits += math.log2(found.perplexity) * found.num_tokens
    return bits / len(text.encode())


def starts_of(arguments: Namespace) -> dict[str, str]:
    """The first `--bytes` of every text, by its name."""
    starts = {
        Path(name).stem: load_text(name, "test").joined.encode()[: arguments.bytes]
        for name in arguments.texts
    }
    return {
        name: start.decode(errors="ignore") for name, start in starts.items()
    }  # the last character may be cut


def measure(arguments: Namespace, key: Row, texts: dict[str, str]) -> Row:
    """Make a row: a variant, pruned and maybe recovered, in one format."""
    folder, commands, minutes = made(arguments, key["variant"], key["tokens"])
    model, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    row = key | {"commands": commands, "minutes": minutes, "parameters": model.num_parameters()}
    if key["format"] == "packed":
        with tempfile.TemporaryDirectory() as temporary:
            pack_folder(folder, packed := Path(temporary) / "packed")
            row["bytes"] = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    else:
        row["bytes"] = round_weights(model, key["format"])
    tokens, written = (
        sum(map(len, found)) for found in (tokenizer([*texts.values()]).input_ids, texts.values())
    )
    row["tokens_per_character"] = tokens / written
    with torch.autocast("cpu", torch.bfloat16):
        length = arguments.sequence_length
        row["bits_per_byte"] = {
            name: bits_per_byte(model, tokenizer, text, length) for name, text in texts.items()
        }
    return row | {"mean": geometric_mean(row["bits_per_byte"].values())}


def seconds(model: Any, prompts: torch.Tensor, new_tokens: int) -> float:
    """Seconds of so many new tokens after each prompt; one new token is the prefill."""
    started = time.perf_counter()
    generate(model, prompts, new_tokens)
    return time.perf_counter() - started


def take_times(arguments: Namespace, rows: Sequence[Row]) -> None:
    """Add the milliseconds of a token to rows, measured in turn."""
    models, folders = list[Any](), [made(arguments, row["variant"], 0)[0] for row in rows]
    entries = min(read_config(str(folder)).vocab_size for folder in folders)
    random = partial(torch.randint, entries, generator=torch.Generator().manual_seed(0))
    asked = {name: (random(size), new) for name, (*size, new) in TIMES.items()}
    with tempfile.TemporaryDirectory() as temporary:
        for row, folder in zip(rows, folders, strict=True):
            place = Path(temporary) / str(len(models))
            write_gguf(folder, place, row["format"])
            models.append(server_of(place, arguments.threads, parallel=16))
            row["seconds"] = {name: [] for name in TIMES}
        for turn in range(arguments.rounds + 1):  # the first one warms up
            for (row, model), (name, question) in product(
                zip(rows, models, strict=True), asked.items()
            ):
                row["seconds"][name] += [seconds(model, *question)] * bool(turn)
    # a prefill counts the tokens of the prompt, the others the new ones
    tokens = {
        name: prompts * (length if new == 1 else new)
        for name, (prompts, length, new) in TIMES.items()
    }
    for row in rows:
        row["ms_a_token"] = {
            n: 1e3 * statistics.median(times) / tokens[n] for n, times in row["seconds"].items()
        }


def frontier(points: dict[int, tuple[float, float]]) -> list[int]:
    """Of points (cost, loss), those with a lower loss than all that cost less, by rising cost."""
    best, found = math.inf, []
    for index in sorted(points, key=lambda i: points[i]):
        if points[index][1] < best:
            best = points[index][1]
            found.append(index)
    return found


def points_of(rows: Sequence[Row]) -> dict[str, dict[int, tuple[float, float]]]:
    """Cost and loss of the rows by what is counted: megabytes, and milliseconds for 1,000 characters of the texts."""
    found = {"megabytes": {i: (row["bytes"] / 1e6, row["mean"]) for i, row in enumerate(rows)}}
    timed = {
        (row["variant"], row["format"]): row["ms_a_token"] for row in rows if "ms_a_token" in row
    }
    of_rows = {i: timed.get((row["variant"], row["format"])) for i, row in enumerate(rows)}
    for name in TIMES if timed else ():
        ms = {
            i: 1e3 * rows[i]["tokens_per_character"] * times[name]
            for i, times in of_rows.items()
            if times
        }
        found[f"{name}, ms"] = {index: (cost, rows[index]["mean"]) for index, cost in ms.items()}
    return found


def table(rows: Sequence[Row]) -> list[str]:
    """Rows by megabytes; costs of the frontier are bold."""
    lines, points = [], points_of(rows)
    for index in sorted(range(len(rows)), key=lambda i: rows[i]["bytes"]):
        row = rows[index]
        costs = [f"{found[index][0]:.3g}" if index in found else "" for found in points.values()]
        bold = [
            f"**{c}**" if index in frontier(f) else c
            for c, f in zip(costs, points.values(), strict=True)
        ]
        losses = (f"{loss:.4f}" for loss in (row["mean"], *row["bits_per_byte"].values()))
        lines.append((row["variant"], row["tokens"] or "", row["format"], *bold, *losses))
    return markdown_lines(
        ("removed", "recovered on", "bits", *points, "mean", *rows[0]["bits_per_byte"]), lines
    )


def draw(rows: Sequence[Row], file: Path) -> None:
    """Bits per byte against each cost, and the frontier as a line; full marks are recovered, shapes are formats."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    counted, variants = points_of(rows), list(dict.fromkeys(row["variant"] for row in rows))
    shapes = dict(zip(dict.fromkeys(row["format"] for row in rows), "sov^DPX", strict=False))
    size = 1 if len(counted) == 1 else 2  # one panel, or four
    figure = Figure(figsize=(7, 4.5) if size == 1 else (11, 8), layout="constrained")
    panels = figure.subplots(size, size, squeeze=False).flat
    for axes, (name, points) in zip(panels, counted.items(), strict=True):
        axes.plot(
            *zip(*(points[i] for i in frontier(points)), strict=True),
            color="grey",
            linewidth=1,
            zorder=0,
        )
        for index, point in points.items():
            row, colour = rows[index], f"C{variants.index(rows[index]['variant'])}"
            axes.plot(
                *point,
                shapes[row["format"]],
                color=colour,
                markerfacecolor=colour if row["tokens"] else "white",
            )
        axes.set(xlabel=name, ylabel="bits per byte", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    for index, variant in enumerate(variants):
        axes.plot([], [], "o", color=f"C{index}", label=variant)
    for bits, shape in shapes.items():
        label = f"{bits} bits" if bits.isdigit() else bits
        axes.plot([], [], shape, color="black", markerfacecolor="white", label=label)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=90, metadata={"Software": None})


def main() -> None:
    helps = {
        "variants": "what is removed",
        "tokens": "to recover on; 0: not recovered",
        "bytes": "of each text",
    }
    helps |= {
        "formats": "bits a weight",
        "work": "folder for models",
        "rounds": "of times, in turn; 0: none",
    }
    lists: dict[str, list[Any]] = {
        "variants": VARIANTS.split(),
        "tokens": [0],
        "formats": ["16", "8", "IQ4_NL"],
    }
    sizes = {
        "num_samples": 16,
        "sequence_length": 512,
        "bytes": 60_000,
        "seed": 0,
        "threads": 1,
        "rounds": 0,
    }
    places = {"work": Path("runs"), "output": Path("runs/frontier.json"), "plot": Path}
    arguments = parse_arguments(
        __doc__, "model", "calibration", "texts", helps=helps, **lists, **sizes, **places
    )
    torch.set_num_threads(arguments.threads)
    texts = starts_of(arguments)
    record = open_record(
        arguments, "variants", "tokens", "formats", "work", "threads", "rounds", "seed"
    )
    for variant in arguments.variants:
        for tokens in arguments.tokens:
            for bits in arguments.formats if sparsity_of(variant) is None else ["packed"]:
                key: Row = {
                    "model": Path(arguments.model).name,
                    "variant": variant,
                    "tokens": tokens,
                    "format": bits,
                }
                key |= {"seed": arguments.seed}
                if not any(key.items() <= row.items() for row in record["rows"]):
                    record["rows"].append(measure(arguments, key, texts))
                    save(arguments, record)
    if arguments.rounds:
        timed = [row for row in record["rows"] if not row["tokens"] and row["format"] != "packed"]
        take_times(arguments, timed)
        save(
            arguments,
            record | {"machine": {"processor": processor_name(), "threads": arguments.threads}},
        )
    print("\n".join(table(record["rows"])))
    if arguments.plot is not None:
        draw(record["rows"], arguments.plot)


if __name__ == "__main__":
    main()
