"""The command `optimum-fista chat`."""

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
    require_seed(arguments.seed)
    terminal, names = (
        sys.stdin.isatty() and sys.stdout.isatty(),
        filter(None, (arguments.model, arguments.beside)),
    )
    speakers = [_Speaker(name, arguments, writes=terminal) for name in names]
    if terminal:
        print("Ctrl-C stops an answer, Ctrl-D ends.")
    with suppress(EOFError):
        while True:
            question = input("> " if terminal else "").strip()
            with suppress(KeyboardInterrupt):
                for speaker in speakers if question else ():
                    who = [f"{speaker.name}:"] if len(speakers) > 1 else []
                    if terminal:
                        print(*who, end=" " * len(who), flush=True)
                    answer = speaker.answer(question)
                    print(
                        *([] if terminal else [*who, *answer.split()]), flush=True
                    )  # a terminal has shown it
    return int(any(speaker.failed for speaker in speakers))


class _Speaker:
    """A model and its conversation: `turns` as chat templates take them."""

    def __init__(self, name: str, settings: argparse.Namespace, *, writes: bool = False) -> None:
        from transformers import GenerationConfig

        from optimum_fista.source.loading import load_model

        self.name, self.settings, self.writes = name, settings, writes
        self.failed, self.turns = False, list[dict[str, str]]()
        loaded: Any = load_model(name, device=settings.device, dtype=settings.dtype)
        self.model, self.tokenizer = loaded
        ends = getattr(
            self.model.generation_config, "eos_token_id", None
        )  # a number, a list or None
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        # Otherwise `generate` would use the folder's settings of sampling and lengths.
        self.model.eval().generation_config = GenerationConfig(
            eos_token_id=[*ends] or None, pad_token_id=[*ends, 0][0]
        )
        config = self.model.config.get_text_config(decoder=True)
        self.room: float = getattr(config, "max_position_embeddings", None) or math.inf

    def answer(self, question: str) -> str:
        """Return the model's answer; after an error it is empty, and the conversation stays as it was."""
        import torch
        from jinja2 import TemplateError
        from transformers import TextStreamer

        def refuse_nan(
            _: Any, scores: Any
        ) -> Any:  # otherwise the first token would seem the most probable
            if scores.isnan().any():
                raise ValueError(
                    f"{self.name} gives NaN logits: look for NaN in its weights, or pass --dtype float32."
                )
            return scores

        def say(piece: str, **_: Any) -> None:
            said.append(piece)
            if self.writes:
                print(piece, end="", flush=True)

        try:
            self.turns, prompt = self._prompt([*self.turns, {"role": "user", "content": question}])
        except (ValueError, TemplateError) as error:
            print(f"error: {self.name} can't answer: {error}", file=sys.stderr)
            self.failed = True
            return ""
        said = list[str]()
        streamer: Any = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = say
        heat, room = self.settings.temperature, self.room - prompt["input_ids"].shape[1]
        options: Any = {"do_sample": True, "temperature": heat, "top_k": 0} if heat else {}
        # Beyond its last position a model writes nonsense, or fails.
        options |= {
            "max_new_tokens": int(min(self.settings.max_new_tokens, room)),
            "streamer": streamer,
        }
        torch.manual_seed(self.settings.seed)  # for every answer, so that two models draw alike
        try:
            self.model.generate(**prompt, **options, logits_processor=[refuse_nan])
        finally:  # what was said until Ctrl-C stays in the conversation
            self.turns.append({"role": "assistant", "content": "".join(said)})
        return "".join(said)

    def _prompt(self, turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """The latest turns that fit into the model, and their tokens; without a template, those of the last turn."""
        form = {"return_tensors": "pt", "return_dict": True, "add_generation_prompt": True}
        for start in range(0, len(turns), 2):  # a question and its answer are dropped together
            if self.tokenizer.chat_template is None:
                found = self.tokenizer(turns[-1]["content"], return_tensors="pt")
            else:
                shown, template = list[Any](turns[start:]), self.tokenizer.apply_chat_template
                if turns[-1]["content"].strip() not in template(
                    shown, tokenize=False
                ):  # it reads parts, as of images
                    shown = [
                        turn | {"content": [{"type": "text", "text": turn["content"]}]}
                        for turn in shown
                    ]
                found = template(shown, **form)
            if 0 < (count := found["input_ids"].shape[1]) < self.room:
                return turns[start:], {
                    n: found[n].to(self.model.device) for n in ("input_ids", "attention_mask")
                }
        raise ValueError(
            f"the question has {count} tokens: it takes at least 1, and fewer than {self.room}."
        )
