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

    Prints the answers, and sets PyTorch's seed before each of them, so that all models draw the same random numbers.
    Questions are lines of the standard input. `arguments` are the flags that `add_arguments` declares. The code is 1 if
    a question could not be answered, otherwise 0.
    """
    require_seed(arguments.seed)  # only a check: each answer sets it
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    names = [arguments.model]
    if arguments.beside:
        names.append(arguments.beside)
    speakers = [_Speaker(name, arguments, writes=in_terminal) for name in names]

    if in_terminal:
        print("Ctrl-C stops an answer, Ctrl-D ends.")
    prompt = "> " if in_terminal else ""
    with suppress(EOFError):  # which `input` raises at the end
        while True:
            question = input(prompt).strip()
            if question:
                with suppress(KeyboardInterrupt):
                    _ask(speakers, question, in_terminal=in_terminal)
    some_failed = any(speaker.failed for speaker in speakers)
    return 1 if some_failed else 0


def _ask(speakers: list["_Speaker"], question: str, *, in_terminal: bool) -> None:
    """Ask each speaker, and print the answers; two speakers are told apart by their names.

    Changes the speakers: question and answer become part of their conversations. `in_terminal`: whether a person sees
    the answers while they come; otherwise each answer is one line.
    """
    for speaker in speakers:
        label = f"{speaker.name}:" if len(speakers) > 1 else ""
        if in_terminal:
            if label:
                print(label, end=" ", flush=True)
            speaker.answer(question)  # which prints each piece when it is there
            print(flush=True)
        else:
            words = speaker.answer(question).split()  # so that the answer has no line breaks
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
        """Load a model by its folder or Hub id (`name`), with generation settings that take the most probable token.

        `settings` are the flags of the command. `writes`: whether answers are printed while they come, as in a
        terminal. A model of the Hub is downloaded into its cache. Sets all fields of the new speaker.
        """
        from transformers import GenerationConfig

        from optimum_fista.source.loading import load_model

        self.name = name
        self.settings = settings
        self.writes = writes
        self.failed = False
        self.turns: list[dict[str, str]] = []

        loaded: Any = load_model(name, device=settings.device, dtype=settings.dtype)
        self.model, self.tokenizer = loaded
        self.model.eval()
        end_ids = self._tokens_that_end_an_answer()
        # Otherwise `generate` would use the folder's settings of sampling and lengths.
        self.model.generation_config = GenerationConfig(
            eos_token_id=end_ids if end_ids else None,
            pad_token_id=end_ids[0] if end_ids else 0,
        )

        config = self.model.config.get_text_config(decoder=True)
        most_positions = getattr(config, "max_position_embeddings", None)
        self.room: float = most_positions if most_positions else math.inf

    def _tokens_that_end_an_answer(self) -> list[int]:
        """Ids that the folder's settings or the tokenizer name as the end of a text; none, if they name none."""
        of_model = getattr(self.model.generation_config, "eos_token_id", None)
        # Folders name one id, several, or none.
        ids_of_model = of_model if isinstance(of_model, list) else [of_model]
        end_ids = {*ids_of_model, self.tokenizer.eos_token_id}
        end_ids.discard(None)
        return list(end_ids)

    def answer(self, question: str) -> str:
        """Answer a question, and add both to the conversation, `self.turns`.

        The oldest turns are dropped if the conversation has more tokens than `self.room`. If the question is too long
        or the chat template fails, an error is printed, the answer is empty, the conversation stays as it was, and
        `self.failed` is True. If `self.writes`, the answer is printed piece by piece. `self.settings` are the flags of
        the command. Sets the seed of PyTorch.
        """
        import torch
        from jinja2 import TemplateError
        from transformers import TextStreamer

        def refuse_nan(_: Any, scores: Any) -> Any:
            """Check the scores of the next token, and return them: with NaN the first token would seem the best."""
            if scores.isnan().any():
                raise ValueError(
                    f"{self.name} gives NaN logits: look for NaN in its weights, or pass --dtype float32."
                )
            return scores

        pieces: list[str] = []

        def say(piece: str, **_: Any) -> None:
            """Add a piece of the answer to `pieces`, and print it in a terminal (`self.writes`)."""
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
        room_for_answer = self.room - prompt["input_ids"].shape[1]
        options: dict[str, Any] = {
            "max_new_tokens": int(min(self.settings.max_new_tokens, room_for_answer)),
            "streamer": streamer,
        }
        if self.settings.temperature:
            options |= {
                "do_sample": True,
                "temperature": self.settings.temperature,
                "top_k": 0,  # draws among all tokens, not only among the 50 most probable ones
            }

        torch.manual_seed(self.settings.seed)  # for every answer, so that two models draw alike
        try:
            self.model.generate(**prompt, **options, logits_processor=[refuse_nan])
        finally:  # what was said until Ctrl-C stays in the conversation
            text = "".join(pieces)
            self.turns.append({"role": "assistant", "content": text})
        return text

    def _prompt(self, turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """The latest of `turns` that fit into the model, and their tokens on its device. Changes nothing.

        `turns` are dictionaries `{"role": "user" or "assistant", "content": text}`, and the last one is a question. The
        tokens are `input_ids` and `attention_mask` [1, length], fewer than `self.room`, the most that the model takes.
        Without a chat template they are those of the last turn. ValueError if no tokens, or too many, are left when
        only the last turn stays.
        """
        count = 0
        for start in range(0, len(turns), 2):  # a question and its answer are dropped together
            tokens = self._tokens(turns[start:])
            count = tokens["input_ids"].shape[1]
            if 0 < count < self.room:
                device = self.model.device
                prompt = {
                    "input_ids": tokens["input_ids"].to(device),
                    "attention_mask": tokens["attention_mask"].to(device),
                }
                return turns[start:], prompt
        raise ValueError(
            f"the question has {count} tokens: ask one of 1 to {self.room - 1} tokens."
        )

    def _tokens(self, turns: list[dict[str, str]]) -> Any:
        """Tokenize a conversation by the chat template, or its last turn if there is no template.

        Returns a dictionary with `input_ids` and `attention_mask`, [1, length]. `turns` are dictionaries
        `{"role": "user" or "assistant", "content": text}`, at least one. They stay as they are.
        """
        last = turns[-1]["content"]
        if self.tokenizer.chat_template is None:
            return self.tokenizer(last, return_tensors="pt")

        apply_template = self.tokenizer.apply_chat_template
        conversation: list[Any] = list(turns)
        # Templates of models that see images may read lists of parts, and write nothing for a plain string. Whether a
        # template reads strings is seen in what it writes.
        reads_strings = last.strip() in apply_template(conversation, tokenize=False)
        if not reads_strings:
            conversation = [
                turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns
            ]
        return apply_template(
            conversation, return_tensors="pt", return_dict=True, add_generation_prompt=True
        )
