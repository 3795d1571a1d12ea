"""Conversations in which a model writes Python functions, to train or calibrate on: a model's own answers.

    python benchmarks/conversations.py MODEL --tokens 40000 --output runs/conversations.jsonl

The functions are those with a docstring in the library of the interpreter that runs this script, without the modules
that `known_texts.py` holds out. The user shows the head of a function with its docstring and asks for the function.
MODEL answers, greedily and in bfloat16. An answer is left out if it has not ended after `--new-tokens`, or if its first
block of code is no Python that defines the function: a model that is trained on talk about functions answers with talk.

HumanEval asks in the same chat template, but with other words and for other functions: none of its problems is read.

Each line of `--output` is a conversation under `messages`. The call ends with the first batch that brings the
conversations to `--tokens`, with the words of the chat template.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from humaneval import code_of, decode_greedily
from known_texts import digest, is_held_out, library_modules
from shared import parse_arguments
from transformers import PreTrainedTokenizerBase

from optimum_fista.source.loading import load_model

Message = dict[str, str]
QUESTION = (
    "Complete this Python function. Answer with the whole function:\n\n```python\n{head}\n```"
)
SHORTEST_DOCSTRING = 60  # characters: a shorter one rarely says what the function does
LONGEST_DOCSTRING = 1_000


@dataclass(frozen=True)
class Function:
    """A function of a module, as far as the user shows it: the lines from `def` to the end of the docstring."""

    name: str
    head: str

    @property
    def question(self) -> Message:
        """What the user asks."""
        return {"role": "user", "content": QUESTION.format(head=self.head)}

    def is_defined_by(self, answer: str) -> bool:
        """Whether the first block of code in an answer is Python that defines the function."""
        try:
            statements = ast.parse(code_of(answer)).body
        except SyntaxError:
            return False
        return any(
            isinstance(node, ast.FunctionDef) and node.name == self.name for node in statements
        )


def functions_of(source: str) -> list[Function]:
    """The functions of a module that have a docstring of a fitting length."""
    functions = list[Function]()
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node) or ""
        if SHORTEST_DOCSTRING <= len(docstring) <= LONGEST_DOCSTRING:
            end = node.body[0].end_lineno  # the docstring is the first statement
            functions.append(Function(node.name, "\n".join(lines[node.lineno - 1 : end])))
    return functions


def library_functions(library: Path) -> list[Function]:
    """The functions of all modules that are not held out, in the order of the hashes of their names."""
    functions = dict[str, Function]()  # by the name of a module and a function
    for module in library_modules(library):
        if is_held_out(module):
            continue
        source = (library / module).read_text(encoding="utf-8", errors="ignore")
        for function in functions_of(source):
            functions[f"{module}:{function.name}"] = function
    return [functions[name] for name in sorted(functions, key=digest)]


def token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, is_asked: bool
) -> list[int]:
    """The token ids of a conversation in the chat template, with `is_asked` up to where the next answer begins."""
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=is_asked
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def conversations(
    model_name: str, functions: Sequence[Function], *, batch_size: int, new_tokens: int
) -> Iterator[tuple[list[list[Message]], int]]:
    """Yield the conversations that are kept of a batch of functions, and the number of their tokens."""
    model, tokenizer = load_model(model_name, dtype="bfloat16", device="cpu")
    end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    for start in range(0, len(functions), batch_size):
        batch = functions[start : start + batch_size]
        answers = decode_greedily(
            model,
            [token_ids(tokenizer, [function.question], is_asked=True) for function in batch],
            new_tokens=new_tokens,
            end=end,
            is_complete=lambda _: False,
        )
        kept = list[list[Message]]()
        for function, ids in zip(batch, answers, strict=True):
            answer = tokenizer.decode(ids)
            if len(ids) < new_tokens and function.is_defined_by(answer):
                kept.append([function.question, {"role": "assistant", "content": answer}])
        yield kept, sum(len(token_ids(tokenizer, each, is_asked=False)) for each in kept)


def main() -> None:
    """Write the conversations."""
    helps = {
        "model": "folder of the model that answers",
        "tokens": "tokens of all conversations",
        "new_tokens": "tokens of the longest answer",
        "batch_size": "questions that are answered together",
        "output": "file to write",
    }
    arguments = parse_arguments(
        __doc__,
        "model",
        "output",
        helps=helps,
        tokens=40_000,
        new_tokens=512,
        batch_size=64,
    )
    functions = library_functions(Path(sysconfig.get_path("stdlib")))
    num_tokens = 0
    with Path(arguments.output).open("w", encoding="utf-8") as file:
        for batch, tokens in conversations(
            arguments.model,
            functions,
            batch_size=arguments.batch_size,
            new_tokens=arguments.new_tokens,
        ):
            for messages in batch:
                file.write(json.dumps({"messages": messages}) + "\n")
            file.flush()
            num_tokens += tokens
            print(f"{num_tokens:,} of {arguments.tokens:,} tokens", flush=True)
            if num_tokens >= arguments.tokens:
                return
    raise SystemExit(
        f"The {len(functions):,} functions gave only {num_tokens:,} tokens: pass --tokens {num_tokens}."
    )


if __name__ == "__main__":
    main()
