"""`optimum-fista chat`."""

from __future__ import annotations

import argparse
import io
import math
import os
import shutil
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from queue import Queue
from typing import TYPE_CHECKING, Any

from optimum_fista.cli.columns import fits, side_by_side

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

DESCRIPTION = """\
Talk to a model in the terminal, alone or beside the dense model.

If the tokenizer has a chat template, the conversation goes on from turn to turn. Without one, the model continues each
line. Tokens are shown as they come. Ctrl-C stops an answer, and Ctrl-D (or the end of what is piped in) ends the chat.
In a pipe every line is a question, and every answer is one line: an empty one, with an error, if the question is too
long.

examples:
  optimum-fista chat ./model-50 --beside ./model
  echo "The sea is" | optimum-fista chat ./model-50 --max-new-tokens 20
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("model", metavar="DIR", help="pruned model folder, packed or not, or any other model")
    add("--beside", metavar="MODEL", help="another model, such as the dense one: its answers are shown as well")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer, in tokens (default 256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the most probable token")
    add("--seed", type=int, default=0, help="seed of the sampling at a temperature above 0 (default 0)")
    add("--device", help="cpu, cuda, cuda:1 (default: the accelerator unless it is mps, otherwise the CPU)")
    add("--dtype", default="auto", help="float32, bfloat16, float16 or auto, as stored (default)")


def run(arguments: argparse.Namespace) -> int:
    """Answer line after line."""
    from optimum_fista.run.options import require_seed

    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {arguments.max_new_tokens}: pass at least 1.")
    if not 0 <= arguments.temperature < float("inf"):
        raise ValueError(f"--temperature {arguments.temperature}: pass 0 or a larger number.")
    names = [arguments.model, *([arguments.beside] if arguments.beside is not None else [])]
    require_seed(arguments.seed)
    speakers = [_Speaker.load(name, arguments) for name in names]
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        print("Ctrl-C stops an answer, Ctrl-D ends.")
    for question in _questions(terminal):
        try:
            _answer(speakers, question, terminal)
        except KeyboardInterrupt:  # what was said until then stays in the conversation
            print()
    return int(any(speaker.failed for speaker in speakers))


def _questions(terminal: bool) -> Iterator[str]:
    """Lines of the user; blank ones are no questions."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a line that is no UTF-8 is a question too
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            if terminal:
                print()
            return
        if line.strip():
            yield line.strip()


def _answer(speakers: list[_Speaker], question: str, terminal: bool) -> None:
    """Let every model answer, and show the answers."""
    size = shutil.get_terminal_size()
    with ExitStack() as opened:  # an answer that is stopped is closed, so that it stays in the conversation
        answers = [opened.enter_context(closing(speaker.answer(question))) for speaker in speakers]
        if not terminal:
            for speaker, answer in zip(speakers, answers, strict=True):
                text = " ".join("".join(answer).split())
                print(f"{speaker.name}: {text}" if len(speakers) > 1 else text, flush=True)
        elif len(speakers) == 1 or not fits(len(speakers), size.columns):
            for speaker, answer in zip(speakers, answers, strict=True):
                if len(speakers) > 1:
                    print(f"{speaker.name}:")
                for piece in answer:
                    print(piece, end="", flush=True)
                print()
        else:
            _answer_in_columns([speaker.name for speaker in speakers], answers, size)


def _answer_in_columns(names: list[str], answers: list[Generator[str]], size: os.terminal_size) -> None:
    """Answers in columns that grow together: a piece of each in turn, and the lines so far drawn over the old ones."""
    texts, drawn, ended = [""] * len(names), 0, set[int]()
    while len(ended) < len(names):
        for index, answer in enumerate(answers):
            piece = next(answer, None)
            if piece is None:
                ended.add(index)
            else:
                texts[index] += piece
        lines = side_by_side(list(zip(names, texts, strict=True)), size.columns - 1)
        back = min(drawn, size.lines - 1)  # lines that have left the screen can't be drawn again
        up = f"\033[{back}A" if back else ""
        print(up + "".join(f"\033[K{line}\n" for line in lines[drawn - back :]), end="", flush=True)
        drawn = len(lines)


@dataclass
class _Speaker:
    """A model and its conversation.

    Attributes:
        ends: Tokens that end an answer.
        turns: What was said, as chat templates take it.
        failed: Whether a question was left without an answer.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    settings: argparse.Namespace
    ends: list[int]
    turns: list[dict[str, str]] = field(default_factory=list)
    failed: bool = False

    @classmethod
    def load(cls, name: str, settings: argparse.Namespace) -> _Speaker:
        """Load a model by name."""
        from transformers import GenerationConfig

        from optimum_fista.run.checkpoints.loading import load_model

        model, tokenizer = load_model(name, device=settings.device, dtype=settings.dtype)
        ends = model.generation_config.eos_token_id if model.generation_config else None
        found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        model.generation_config = GenerationConfig()  # whose sampling and lengths `generate` would obey
        return cls(name, model.eval(), tokenizer, settings, sorted(found))

    def answer(self, question: str) -> Generator[str]:
        """Pieces of the answer as `generate` writes them, in a thread that ends when this generator is closed.

        There are none if the model can't be asked: an error is shown, and the conversation stays as it was.
        """
        import torch

        try:
            ids = self._prompt(question).to(self.model.device)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            self.failed = True
            return
        written: list[int] = []
        pieces: Queue[list[int] | BaseException | None] = Queue()
        closed = threading.Event()
        room = (self._positions() or math.inf) - ids.shape[1]
        thread = threading.Thread(
            target=_generate,
            args=(self, ids, int(min(self.settings.max_new_tokens, room)), pieces, closed),
            daemon=True,  # a second Ctrl-C ends the program
        )
        shown = ""
        thread.start()
        try:
            while (tokens := pieces.get()) is not None:
                if isinstance(tokens, BaseException):
                    raise tokens
                written += tokens
                text = str(self.tokenizer.decode(torch.tensor(written), skip_special_tokens=True))
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the tokens so far may end within a character
                    piece, shown = text[len(shown) :], text
                    yield piece
        finally:
            closed.set()
            thread.join()
            self.turns.append({"role": "assistant", "content": shown})

    def _prompt(self, question: str) -> Any:
        """Token ids [1, T] of the conversation and a question, or of the question alone without a chat template.

        Raises:
            ValueError: If the question is longer than the model has positions for, the chat template fails, or there
                are no tokens.
        """
        from jinja2 import TemplateError

        earlier = [*self.turns]
        self.turns.append({"role": "user", "content": question})
        while True:
            if self.tokenizer.chat_template is None:
                ids = self.tokenizer(question, return_tensors="pt").input_ids
            else:
                options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
                try:
                    prompt: Any = self.tokenizer.apply_chat_template(self.turns, **options)
                except TemplateError as error:
                    self.turns = earlier
                    raise ValueError(f"the chat template of {self.name} fails: {error}") from error
                ids = prompt["input_ids"]
            if not ids.shape[1]:
                self.turns = earlier
                raise ValueError(f"the tokenizer of {self.name} makes no tokens of the question.")
            limit = self._positions()
            if limit is None or ids.shape[1] < limit:
                return ids
            if self.tokenizer.chat_template is None or len(self.turns) == 1:
                self.turns = earlier
                raise ValueError(
                    f"the question has {ids.shape[1]} tokens, and {self.name} has positions for {limit}: shorten it."
                )
            del self.turns[:2]  # the oldest question and its answer are forgotten

    def _positions(self) -> int | None:
        """How many positions the model has, if its configuration says so."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _generate(speaker: _Speaker, ids: Tensor, count: int, pieces: Queue[Any], closed: threading.Event) -> None:
    """Put the tokens that `generate` adds to `ids` [1, T] into a queue, and at the end `None` or what went wrong."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        """Hands on all but the prompt, which comes first."""

        prompt_seen = False

        def put(self, value: Tensor) -> None:
            if self.prompt_seen:
                pieces.put(value.flatten().tolist())
            self.prompt_seen = True

        def end(self) -> None:
            """What went wrong comes after it, so nothing is said here."""

    temperature = speaker.settings.temperature
    generator = torch.Generator(ids.device).manual_seed(speaker.settings.seed)

    def refuse_nan(_: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise ValueError(
                f"{speaker.name} gives NaN logits: look for NaN in its weights, or pass --dtype float32 if it "
                "overflows in 16 bits."
            )
        return scores

    def sample(_: Tensor, scores: Tensor) -> Tensor:
        """Scores whose largest one is a sample of the softmax at the temperature (Gumbel's trick).

        So a seed gives the same answer whatever else draws random numbers, such as the model beside.
        """
        noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=generator)
        return scores.float() / temperature - noise.log()

    try:
        speaker.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=speaker.ends or None,
            pad_token_id=speaker.ends[0] if speaker.ends else 0,
            logits_processor=[refuse_nan, *([sample] if temperature > 0 else [])],
            stopping_criteria=[lambda found, _: torch.full((len(found),), closed.is_set(), device=found.device)],
            streamer=Streamer(),
        )
        pieces.put(None)
    except BaseException as error:
        pieces.put(error)
