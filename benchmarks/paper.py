"""What the reviewers of FISTAPruner asked, answered by rows: the measurements and tables of docs/paper.md.

    python benchmarks/paper.py MODEL --calibration TEXT --other TEXT --texts TEXT1,TEXT2 --output runs/reviewers.json
    python benchmarks/paper.py MODEL ... --questions sgd,start     # some of them
    python benchmarks/paper.py MODEL ... --questions sgd --only descents    # a part of one of them
    python benchmarks/paper.py benchmarks/results/reviewers.json   # measures nothing: the tables
    # and this writes them into the page, and draws its picture:
    python benchmarks/paper.py benchmarks/results/reviewers.json --page docs/paper.md --plot docs/paper.png

A *question* is a part of the page. It has rows in `--output`, in other files of benchmarks/results, or in both. A
*unit* is a piece of work whose rows are written when they are measured, such as all warm starts of one operator. The
same command resumes: units that `--output` has are not measured again. Layer problems are made by `paper_layers.py`,
the training of a decoder layer by `paper_blocks.py`, whole models by `compare.py`, LLM-Pruner and the training of
adapters by `paper_structured.py`, and tables by `paper_tables.py`.
"""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import compare
import paper_blocks
import paper_layers
import paper_structured
import torch
from estimate import MODELS
from paper_competitors import plot
from paper_rows import Results
from paper_tables import QUESTIONS, tables_in
from shared import open_record, parse_arguments, parse_config, save
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from optimum_fista import FistaPruner, recover
from optimum_fista.estimate.estimate import Estimate
from optimum_fista.evaluate.perplexity import evaluate_perplexity
from optimum_fista.model.choice import find_operators
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.model.operators import LinearOperator
from optimum_fista.source.loading import load_model, require_tokenizer
from optimum_fista.text.calibration_tokens import calibration_windows
from optimum_fista.text.sources import load_text

Row = dict[str, Any]
Key = dict[str, Any]
"""What tells a unit from others: its part, and for example its operator and pattern."""

PATTERNS = ("0.5", "2:4")
_PAPER = "paper:max_trials=4"
"""FISTAPruner with at most four trials of the penalty, which take a fifth of the time of the published search."""
WHOLE_MODELS: dict[str, list[tuple[str, str]]] = {
    "correction": [
        (f"{_PAPER}{correction}", pattern)
        for pattern in ("0.5", "2:4", "0.7", "0.6", "0.3")
        for correction in ("", ":error_correction=none", ":error_correction=full")
    ],
    "parts": [
        (method, pattern)
        for pattern in PATTERNS
        for method in (
            "default",
            "default:error_correction=none",
            "default:allocation=uniform",
            "default:refit_iterations=0",
            _PAPER,
            f"{_PAPER}:error_correction=none",
            "paper:max_trials=1",
            f"{_PAPER}:refit_iterations=20",
            f"{_PAPER}:warm_start=sparsegpt",
        )
        if not (pattern == "2:4" and "allocation" in method)  # zeros can't move in n:m patterns
    ],
}
"""Methods and patterns of whole models, by question."""
QUANTIZED = [("dense", "-"), ("default", "0.5"), ("default", "2:4")]
RETRAINED = [("wanda", "0.5"), ("sparsegpt", "0.5"), (_PAPER, "0.5"), ("default", "0.5")]
LLM_PRUNER = "llm-pruner"
"""The method that `paper_structured.py` has, and the package has not."""
ADAPTER_RATES = (3e-3,)
"""Learning rates of adapters that are tried; the better one counts. 3e-4 was tried once, and was much worse."""
NUM_TRAINING_WINDOWS = 1024
"""Windows of the calibration text of which adapters see some, at random."""
STRUCTURED = [
    ("default", "channels:0.25"),
    (LLM_PRUNER, "channels:0.25"),
    ("default", "layers:0.2"),
    ("default:residual_correction=0", "layers:0.2"),  # SLEB
    (LLM_PRUNER, "heads:0.34+channels:0.156/16"),
    ("default", "heads:0.34+channels:0.156/16"),
    ("flap", "channels:0.25"),
    ("flap", "heads:0.34+channels:0.156/16"),
]
"""Methods and patterns that remove a fifth of the decoder layers' weights."""
SAMPLED = [
    (method, count) for count in (4, 256) for method in ("wanda", "sparsegpt", "default", _PAPER)
]
"""Methods and numbers of calibration windows of whole models at 50%, besides the usual number."""
ESTIMATED = ("default", "paper")


class Session:
    """What the units of one call share: the arguments, and models and layer problems, made when first needed."""

    def __init__(self, arguments: Namespace, rows: list[Row]) -> None:
        """Keep the arguments, and the rows so far; nothing is loaded yet."""
        self.arguments = arguments
        self.rows = rows

    @cached_property
    def operators(self) -> dict[tuple[int, str], paper_layers.Operator]:
        """Layer problems by decoder layer and kind, such as (3, "q_proj")."""
        wants_counts = "samples" in self.arguments.questions
        counts = self.arguments.sample_counts if wants_counts else []
        with torch.no_grad():
            operators = paper_layers.operators_of(self.arguments, counts=counts)
        by_kind = {}
        for operator in operators:
            words = operator.name.removesuffix(".weight").split(".")
            layer = next(int(word) for word in words if word.isdigit())
            by_kind[layer, words[-1]] = operator
        return by_kind

    @cached_property
    def case(self) -> Namespace:
        """The arguments of `compare.measure` for whole models."""
        usual = {
            "methods": ["default"],
            "seeds": [0],
            "held_out": 0,
            "bos": "auto",
            "device": "cpu",
            "dtype": "float32",
            "device_map": None,
            "storage_device": None,
            "calibration_length": None,
        }
        return Namespace(**vars(self.arguments) | usual)

    @cached_property
    def windows(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Token ids to calibrate on, and those to measure on by name, each [windows, length]."""
        tokenizer = require_tokenizer(self.arguments.model)
        calibration, texts, _ = compare.draw(self.case, tokenizer, self.arguments.seed)
        (windows,) = calibration.values()  # of the only text
        return windows, texts


Unit = tuple[Key, Callable[[Session], Iterable[Row]]]


def units(question: str, arguments: Namespace) -> Iterator[Unit]:
    """Yield the units of a question: what tells them apart, and the function that measures their rows."""
    operators = [(layer, kind) for layer in arguments.layers for kind in arguments.operators]
    if question in WHOLE_MODELS:
        # Questions may share units, such as the dense model: a unit that was measured is passed over (`measure`).
        for method, pattern in [compare.DENSE, *WHOLE_MODELS[question]]:
            key: Key = {"part": "models", "method": method, "pattern": pattern}
            yield key, whole_model(method, pattern)
    if question == "sgd":
        for penalty in paper_layers.PENALTIES:
            for layer, kind in operators:
                yield of_operator("descents", layer, kind, paper_layers.descents, penalty=penalty)
        for layer in arguments.layers:
            yield {"part": "blocks", "layer": layer}, block(layer)

    def search(operator: paper_layers.Operator, pattern: str) -> Iterator[Row]:
        """Compare searches with the seeds of the command line."""
        return paper_layers.searches(operator, pattern, arguments.seeds)

    of_patterns: dict[str, tuple[str, Callable[..., Iterable[Row]]]] = {
        "search": ("searches", search),
        "start": ("starts", paper_layers.starts),
        "samples": ("samples", paper_layers.sample_counts),
        "competitors": ("swaps", paper_layers.swaps),
    }
    if question in of_patterns:
        part, measure = of_patterns[question]
        for pattern in PATTERNS:
            for layer, kind in operators:
                yield of_operator(part, layer, kind, measure, pattern=pattern)
    if question == "competitors":
        for method, pattern in RETRAINED:
            key = {"part": "retrained", "method": method, "pattern": pattern}
            yield key, retrained(method, pattern)
        for method, pattern in RETRAINED:
            key = {"part": "adapted", "method": method, "pattern": pattern}
            yield key, adapted(method, pattern)
    if question == "structured":
        for method, pattern in STRUCTURED:
            key = {"part": "structured", "method": method, "pattern": pattern}
            yield key, structured(method, pattern)
    if question == "samples":
        for method, count in SAMPLED:
            key = {"part": "sampled", "method": method, "pattern": "0.5", "samples": count}
            yield key, sampled(method, count)
    if question == "quantize":
        for method, pattern in QUANTIZED:
            key = {"part": "quantized", "method": method, "pattern": pattern}
            yield key, quantized(method, pattern)
    if question == "size":
        for method in ESTIMATED:
            yield {"part": "estimates", "method": method}, estimated(method)


def of_operator(
    part: str, layer: int, kind: str, measure: Callable[..., Iterable[Row]], **setting: str
) -> Unit:
    """Make a unit of one operator; `measure` gets it and the setting, such as `pattern="2:4"`."""

    def run(session: Session) -> Iterable[Row]:
        """Measure."""
        operator = session.operators[layer, kind]
        with torch.no_grad():
            return list(measure(operator, **setting))

    return {"part": part, "layer": layer, "kind": kind} | setting, run


def whole_model(method: str, pattern: str) -> Callable[[Session], Iterable[Row]]:
    """Make the function that prunes and measures a whole model."""

    def run(session: Session) -> Iterable[Row]:
        """Measure by `compare.py`."""
        row, _ = compare.measure(session.case, method, pattern, session.arguments.seed)
        if row["error"] is not None:
            raise SystemExit(f"{method}, {pattern}: {row['error']}")
        return [{name: row[name] for name in ("perplexity", "totals", "seconds")}]

    return run


def block(layer: int) -> Callable[[Session], Iterable[Row]]:
    """Make the function that trains a decoder layer by SGD."""

    def run(session: Session) -> Iterable[Row]:
        """Measure on the calibration windows, and on windows of the first text."""
        model, _ = load_model(session.arguments.model, dtype="float32", device="cpu")
        paper_blocks.cut_after(model, layer)
        calibration, texts = session.windows
        other = next(iter(texts.values()))[: session.arguments.num_fresh]
        return list(paper_blocks.measure_layer(model, layer, calibration, other))

    return run


def batches_of(session: Session) -> list[Tensor]:
    """Return the calibration windows in batches."""
    calibration, _ = session.windows
    return list(calibration.split(session.arguments.batch_size))


def pruned_model(session: Session, method: str, pattern: str) -> PreTrainedModel:
    """Load the model and prune it in memory, unless it shall be dense."""
    model, _ = load_model(session.arguments.model, dtype="float32", device="cpu")
    if (method, pattern) != compare.DENSE:
        FistaPruner(parse_config(method, pattern)).prune(model, batches_of(session))
    return model


def perplexities(session: Session, model: PreTrainedModel) -> dict[str, float]:
    """Measure a model on the texts."""
    _, texts = session.windows
    return {
        name: evaluate_perplexity(
            model, windows, batch_size=session.arguments.batch_size
        ).perplexity
        for name, windows in texts.items()
    }


def quantized(method: str, pattern: str) -> Callable[[Session], Iterable[Row]]:
    """Make the function that prunes a model and rounds it to fewer bits."""

    def run(session: Session) -> Iterable[Row]:
        """Measure at 32, 8 and 4 bits, of the same weights."""
        model = pruned_model(session, method, pattern)
        rows = [{"bits": 32, "perplexity": perplexities(session, model)}]
        operators: dict[str, LinearOperator] = {}
        for name, layer in find_decoder_layers(model):
            operators |= find_operators(name, layer)
        exact = {name: one.module.weight.detach().clone() for name, one in operators.items()}
        for bits in (8, 4):
            for name, operator in operators.items():
                operator.module.weight.data.copy_(round_to_bits(exact[name], bits))
            rows.append({"bits": bits, "perplexity": perplexities(session, model)})
        return rows

    return run


def round_to_bits(weight: Tensor, bits: int) -> Tensor:
    """Round a matrix [out, in] to integers of so many bits, with a scale for each 32 inputs of a row.

    The largest of a group is exact, and zeros stay zero.
    """
    largest_integer = 2 ** (bits - 1) - 1
    group = math.gcd(32, weight.shape[1])
    groups = weight.unflatten(1, (-1, group))  # [out, groups, group]
    scale = groups.abs().amax(-1, keepdim=True) / largest_integer
    integers = (groups / scale.clamp_min(1e-30)).round()
    return (integers * scale).flatten(1)


def retrained(method: str, pattern: str) -> Callable[[Session], Iterable[Row]]:
    """Make the function that prunes a model and trains its norms (PERP), or all kept weights, for equal tokens."""

    def run(session: Session) -> Iterable[Row]:
        """Measure before and after; models lie in `--work`."""
        folder = pruned_folder(session, method, pattern)
        rows = [trained_row(session, "nothing", 0.0, folder)]
        for train in ("norms", "all"):
            trained, minutes = recovered(session, folder, train)
            rows.append(trained_row(session, train, minutes, trained))
        return rows

    return run


def adapted(method: str, pattern: str) -> Callable[[Session], Iterable[Row]]:
    """Make the function that trains adapters under the masks (PERP), for the time of `retrained` with all weights."""

    def run(session: Session) -> Iterable[Row]:
        """Measure; the time is that of a row of `retrained`."""
        key = {"part": "retrained", "method": method, "pattern": pattern, "trained": "all"}
        minutes = next(row["core_minutes"] for row in session.rows if key.items() <= row.items())
        folder = pruned_folder(session, method, pattern)
        return adapter_rows(session, folder, minutes, paper_structured.train_masked_adapters)

    return run


def structured(method: str, pattern: str) -> Callable[[Session], Iterable[Row]]:
    """Make the function that removes parts of a model, and trains all its weights or adapters for equal time."""

    def run(session: Session) -> Iterable[Row]:
        """Measure before and after."""
        folder = pruned_folder(session, method, pattern)
        rows = [trained_row(session, "nothing", 0.0, folder)]
        trained, minutes = recovered(session, folder, "all")
        rows.append(trained_row(session, "all", minutes, trained))
        rows += adapter_rows(session, folder, minutes, paper_structured.train_adapters)
        return rows

    return run


def pruned_folder(session: Session, method: str, pattern: str) -> Path:
    """Return the folder in `--work` of a pruned model, which is made if it is not there."""
    arguments = session.arguments
    words = f"{method}-{pattern}"
    for sign in ":=/+":
        words = words.replace(sign, "-")
    folder: Path = arguments.work / words
    if folder.exists():
        return folder
    if method == LLM_PRUNER:
        model, tokenizer = load_model(arguments.model, dtype="float32", device="cpu")
        parts = {}
        for term in pattern.split("+"):
            kind, _, share = term.partition(":")
            parts[kind] = float(share.partition("/")[0])
        paper_structured.remove_parts(model, batches_of(session), parts)
        # The folder gets its name when it is whole: a folder that exists is not made again.
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    else:
        pruner = FistaPruner(parse_config(method, pattern))
        pruner.prune(arguments.model, batches_of(session), output_dir=folder)
    return folder


def recovered(session: Session, folder: Path, train: str) -> tuple[Path, float]:
    """Train a pruned model by `recover`; returns its folder, and the minutes of the processor."""
    arguments = session.arguments
    output = folder.with_name(f"{folder.name}-{train}")
    began = time.process_time()
    recover(
        folder,
        arguments.model,
        output,
        calibration=arguments.calibration,
        tokens=arguments.tokens,
        train=train,
        device="cpu",
        seed=arguments.seed,
        overwrite=True,
    )
    return output, (time.process_time() - began) / 60


def trained_row(session: Session, trained: str, minutes: float, folder: Path) -> Row:
    """Measure a model and say what was trained for how many minutes."""
    model, _ = load_model(str(folder), dtype="float32", device="cpu")
    return {
        "trained": trained,
        "core_minutes": minutes,
        "parameters": sum(one.numel() for one in model.parameters()),
        "perplexity": perplexities(session, model),
    }


def adapter_rows(
    session: Session,
    folder: Path,
    minutes: float,
    train: Callable[..., tuple[PreTrainedModel, int]],
) -> Iterator[Row]:
    """Train adapters of a pruned model on the calibration text with each learning rate, and measure.

    Args:
        session: Has the arguments.
        folder: The pruned model.
        minutes: Of the processor, for each learning rate.
        train: `train_adapters` or `train_masked_adapters`.
    """
    arguments = session.arguments
    tokenizer = require_tokenizer(arguments.model)
    text = load_text(arguments.calibration, "calibration")
    windows = calibration_windows(
        tokenizer, text, NUM_TRAINING_WINDOWS, arguments.sequence_length, arguments.seed
    )
    for rate in ADAPTER_RATES:
        model, _ = load_model(str(folder), dtype="float32", device="cpu")
        model, num_tokens = train(
            model, windows, seconds=60 * minutes, rate=rate, seed=arguments.seed
        )
        yield {
            "trained": "adapters",
            "rate": rate,
            "core_minutes": minutes,
            "num_tokens": num_tokens,
            "perplexity": perplexities(session, model),
        }


def sampled(method: str, count: int) -> Callable[[Session], Iterable[Row]]:
    """Make the function that prunes a whole model to 50% on so many calibration windows."""

    def run(session: Session) -> Iterable[Row]:
        """Measure by `compare.py`."""
        case = Namespace(**vars(session.case) | {"num_samples": count})
        row, _ = compare.measure(case, method, "0.5", session.arguments.seed)
        if row["error"] is not None:
            raise SystemExit(f"{method}, {count} windows: {row['error']}")
        return [{"perplexity": row["perplexity"], "seconds": row["seconds"]}]

    return run


def estimated(method: str) -> Callable[[Session], Iterable[Row]]:
    """Make the function that estimates LLaMA-3-70B: arithmetic, from its published sizes."""

    def run(_: Session) -> Iterable[Row]:
        """Estimate for 128 sequences of 2048 tokens; nothing is measured, and no device is needed."""
        settings = dict(MODELS["Llama-3-70B"])
        model_type = settings.pop("model_type")
        config = AutoConfig.for_model(model_type, max_position_embeddings=8192, **settings)
        estimate = Estimate(
            config,
            parse_config(method, "0.5"),
            num_samples=128,
            sequence_length=2048,
            batch_size=1,
            device="cuda",
            storage_device="cpu",
        )
        yield {
            "model": "Llama-3-70B",
            "weight_bytes": estimate.weight_bytes,
            "peak_bytes": {place: sum(parts.values()) for place, parts in estimate.memory.items()},
            "disk_bytes": sum(estimate.disk_bytes.values()),
        }

    return run


def measure(arguments: Namespace) -> dict[str, Any]:
    """Measure the units that `arguments.output` lacks, and write the rows of each; returns the record.

    A unit is there if the record has a row with all entries of its key.
    """
    record = open_record(arguments, "questions", "only", "work", "page", "results")
    rows: list[Row] = record["rows"]
    session = Session(arguments, rows)
    for question in arguments.questions:
        for key, run in units(question, arguments):
            if arguments.only and key["part"] not in arguments.only:
                continue
            if any(key.items() <= row.items() for row in rows):
                continue
            print(question, *key.values(), flush=True)
            began = time.process_time()
            measured = [key | row for row in run(session)]
            # Noted once, so that the sum over all rows is the time of all units.
            measured[0]["unit_seconds"] = time.process_time() - began
            rows += measured
            save(arguments, record)
            print(f"  {measured[0]['unit_seconds']:.0f} s of the processor", flush=True)
    return record


_HELP = {
    "model": "model folder, or the JSON file of an earlier call",
    "questions": f"some of {', '.join(QUESTIONS)}",
    "only": "parts to measure, such as swaps or blocks; all parts of the questions if none is given",
    "other": "text that is not the calibration text, for the errors of single operators",
    "layers": "decoder layers of which single operators are measured",
    "operators": "ends of the names of these operators",
    "sample_counts": "calibration sequences in the question samples",
    "num_fresh": "windows for the errors on fresh and other text",
    "seeds": "of the searches that draw",
    "seed": "by which calibration windows are drawn",
    "tokens": "tokens to train on in the question competitors",
    "work": "folder of models in the question competitors",
    "page": "page to write the tables into",
    "plot": "picture of the errors by operator and pattern",
    "results": "folder with the rows of other benchmarks",
}


def arguments_given() -> Namespace:
    """Read the command line; SystemExit if a question is not known."""
    arguments = parse_arguments(
        __doc__,
        "model",
        helps=_HELP,
        questions=list(QUESTIONS),
        only=[],
        calibration="c4",
        texts=["wikitext2"],
        other="wikitext2",
        layers=[3, 9],
        operators=["q_proj", "o_proj", "gate_proj"],
        sample_counts=[4, 16, 64],
        num_samples=16,
        num_fresh=8,
        sequence_length=512,
        max_windows=16,
        batch_size=4,
        seeds=[0, 1, 2],
        seed=0,
        tokens=16384,
        work=Path("runs/reviewers"),
        page=Path,
        plot=Path,
        results=Path(__file__).parent / "results",
        output=Path("runs/reviewers.json"),
    )
    for question in arguments.questions:
        if question not in QUESTIONS:
            known = ", ".join(QUESTIONS)
            raise SystemExit(f"--questions: {question!r} is unknown; pass some of {known}.")
    return arguments


def main() -> None:
    """Measure what the output lacks, or read the rows of an earlier call; print the tables, and write them."""
    arguments = arguments_given()
    file = Path(arguments.model)
    is_record = file.is_file() and file.suffix == ".json"
    record = json.loads(file.read_text()) if is_record else measure(arguments)
    results = Results(record["rows"], arguments.results)
    for name in arguments.questions:
        print("\n".join([f"\n{name}\n", *QUESTIONS[name].table(results)]))
    if arguments.page:
        text = arguments.page.read_text()
        arguments.page.write_text(tables_in(text, results))
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
