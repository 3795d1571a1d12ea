"""The command `optimum-fista chat`: `add_arguments` declares its flags, and `run` asks one model or two.

A *speaker* is a model with its tokenizer and its conversation. In a terminal the answers appear piece by piece; in a
pipe every answer is one line.
"""

import argparse
import math
import sys
from contextlib import suppress
from typing import Any

from optimum_fista.cli.flags import DEVICE, DTYPE
from optimum_fista.options import require_seed

DESCRIPTION = """\
Talk to a model in the terminal, alone or beside the dense model.

With a chat template the model remembers the conversation. Without one, it continues each line by itself. In a pipe
every line is a question, and every answer is one line. If a question is too long, its answer is empty, and an error is
printed.

examples:
  optimum-fista chat ./model-50 --beside ./model
  echo "The sea is" | optimum-fista chat ./model-50 --max-new-tokens 20
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command to its parser."""
    add = parser.add_argument
    add("model", metavar="DIR", help="pruned model folder, packed or not, or any other model")
    add(
        "--beside",
        metavar="MODEL",
        help="another model, such as the dense one: its answers are shown as well",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="longest answer, in tokens (default 256)",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default) takes the most probable token",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the sampling at a temperature above 0 (default 0)",
    )
    add("--device", **DEVICE)
    add("--dtype", **DTYPE)


def run(arguments: argparse.Namespace) -> int:
    """Load the models and answer questions until the input ends; returns the exit code.

    `arguments` are those of `add_arguments`. The code is 1 if a question could not be answered.
    """
    require_seed(arguments.seed)
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    names = [arguments.model]
    if arguments.beside:
        names.append(arguments.beside)
    speakers = [_Speaker(name, arguments, writes=in_terminal) for name in names]

    if in_terminal:
        print("Ctrl-C stops an answer, Ctrl-D ends.")
    with suppress(EOFError):
        while True:
            question = input("> " if in_terminal else "").strip()
            if question:
                with suppress(KeyboardInterrupt):
                    _ask(speakers, question, in_terminal=in_terminal)
    return int(any(speaker.failed for speaker in speakers))


def _ask(speakers: list["_Speaker"], question: str, *, in_terminal: bool) -> None:
    """Ask each speaker, and print the answers; two speakers are told apart by their names."""
    for speaker in speakers:
        label = f"{speaker.name}:" if len(speakers) > 1 else ""
        if in_terminal:
            if label:
                print(label, end=" ", flush=True)
            speaker.answer(question)  # which prints each piece when it is there
            print(flush=True)
        else:
            words = speaker.answer(question).split()
            line = [label, *words] if label else words
            print(" ".join(line), flush=True)


class _Speaker:
    """A model and its conversation.

    Attributes:
        name: Folder or Hub id.
        turns: The conversation as chat templates take it: `{"role": "user" or "assistant", "content": text}`.
        room: Tokens that the model takes at most, question and answer together; infinite if it has no limit.
        failed: Whether a question could not be answered.
    """

    def __init__(self, name: str, settings: argparse.Namespace, *, writes: bool = False) -> None:
        """Load a model; `settings` are the flags of the command, and if it `writes`, answers are printed."""
        from transformers import GenerationConfig

        from optimum_fista.source.loading import load_model

        self.name = name
        self.settings = settings
        self.writes = writes
        self.failed = False
        self.turns: list[dict[str, str]] = []

        loaded: Any = load_model(name, device=settings.device, dtype=settings.dtype)
        self.model, self.tokenizer = loaded
        ends = self._tokens_that_end_an_answer()
        # Otherwise `generate` would use the folder's settings of sampling and lengths.
        self.model.eval().generation_config = GenerationConfig(
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        config = self.model.config.get_text_config(decoder=True)
        self.room: float = getattr(config, "max_position_embeddings", None) or math.inf

    def _tokens_that_end_an_answer(self) -> list[int]:
        """Ids that the folder's settings or the tokenizer name as the end of a text."""
        of_model = getattr(self.model.generation_config, "eos_token_id", None)
        several = of_model if isinstance(of_model, list) else [of_model]
        return [*({*several, self.tokenizer.eos_token_id} - {None})]

    def answer(self, question: str) -> str:
        """Answer a question, and add both to the conversation.

        The oldest turns are dropped if the conversation is too long for the model. After an error, which is printed,
        the answer is empty, the conversation stays as it was, and `failed` is True. Sets the seed of PyTorch.
        """
        import torch
        from jinja2 import TemplateError
        from transformers import TextStreamer

        def refuse_nan(_: Any, scores: Any) -> Any:
            """Check the scores of the next token: with NaN the first token would seem the most probable."""
            if scores.isnan().any():
                raise ValueError(
                    f"{self.name} gives NaN logits: look for NaN in its weights, or pass --dtype float32."
                )
            return scores

        pieces: list[str] = []

        def say(piece: str, **_: Any) -> None:
            """Keep a piece of the answer, and print it in a terminal."""
            pieces.append(piece)
            if self.writes:
                print(piece, end="", flush=True)

        try:
            self.turns, prompt = self._prompt([*self.turns, {"role": "user", "content": question}])
        except (ValueError, TemplateError) as error:
            print(f"error: {self.name} can't answer: {error}", file=sys.stderr)
            self.failed = True
            return ""

        streamer: Any = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = say
        # Beyond its last position a model writes nonsense, or fails.
        room = self.room - prompt["input_ids"].shape[1]
        options: dict[str, Any] = {
            "max_new_tokens": int(min(self.settings.max_new_tokens, room)),
            "streamer": streamer,
        }
        if self.settings.temperature:
            options |= {
                "do_sample": True,
                "temperature": self.settings.temperature,
                "top_k": 0,
            }

        torch.manual_seed(self.settings.seed)  # for every answer, so that two models draw alike
        try:
            self.model.generate(**prompt, **options, logits_processor=[refuse_nan])
        finally:  # what was said until Ctrl-C stays in the conversation
            text = "".join(pieces)
            self.turns.append({"role": "assistant", "content": text})
        return text

    def _prompt(self, turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """The latest of `turns` that fit into the model, and their tokens on its device.

        The tokens are `input_ids` and `attention_mask` [1, length]. Without a chat template they are those of the last
        turn.
        """
        count = 0
        for start in range(0, len(turns), 2):  # a question and its answer are dropped together
            tokens = self._tokens(turns[start:])
            count = tokens["input_ids"].shape[1]
            if 0 < count < self.room:
                device = self.model.device
                return turns[start:], {
                    name: tokens[name].to(device) for name in ("input_ids", "attention_mask")
                }
        raise ValueError(
            f"the question has {count} tokens: it takes at least 1, and fewer than {self.room}."
        )

    def _tokens(self, turns: list[dict[str, str]]) -> Any:
        """Tokens of a conversation by the chat template, or of its last turn if there is no template."""
        last = turns[-1]["content"]
        if self.tokenizer.chat_template is None:
            return self.tokenizer(last, return_tensors="pt")

        template = self.tokenizer.apply_chat_template
        shown: list[Any] = list(turns)
        reads_strings = last.strip() in template(shown, tokenize=False)
        if not reads_strings:  # it reads parts, as templates of models that see images do
            shown = [
                turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns
            ]
        return template(shown, return_tensors="pt", return_dict=True, add_generation_prompt=True)
