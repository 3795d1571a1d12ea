"""Where the files of a model name tokens by their ids, and how these ids are replaced.

Ids stand in the configuration of the model and of its parts (`eos_token_id`), in those of generation, tokenizer and
processor (`*_config.json`), and in what a chat template writes. A smaller vocabulary keeps all tokens that are named
there, and gives them new ids. `new_ids` has the new id of each token that stays, by its old id.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from optimum_fista.source.model_folder import read_json

# Keys whose numbers are ids of tokens, in every family of Transformers; ids of sounds are not those of text.
_KEYS_OF_IDS = re.compile(
    r"(?!codec|codebook|audio_stream)(.*_)?"
    r"(tokens?_(ids?|index|indices)|(start|end|patch|newline|bos|eos|pad)_ids?|suppress_tokens|words_ids|sequence_bias)"
)
# Keys whose values map a word to the id of its token, as Whisper's `{"<|en|>": 50259}`.
_MAPS_TO_IDS = ("lang_to_id", "task_to_id")
# Its values are pairs of a position and the id of the token there.
_PAIRS_WITH_IDS = "forced_decoder_ids"
# Lines of a chat template that may run: a real one needs some hundred for two messages.
_MOST_STEPS = 1_000_000


def configurations_in(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return a model's configuration and those in it, without those of other vocabularies, such as that of a codec.

    They are the objects themselves, not copies: who changes them changes the configuration. Nothing is changed here.
    """
    size = config.get_text_config(decoder=True).vocab_size
    same_vocabulary = list[PreTrainedConfig]()
    waiting = [config]
    while waiting:
        section = waiting.pop(0)
        # A section without a size has no vocabulary, but may name tokens of the text, such as that of an image.
        has_other_vocabulary = hasattr(section, "vocab_size") and section.vocab_size != size
        # The whole configuration names tokens of the text in any case, such as `eos_token_id`.
        if section is config or not has_other_vocabulary:
            same_vocabulary.append(section)
        # also those in a section with another vocabulary
        waiting += [
            value for value in vars(section).values() if isinstance(value, PreTrainedConfig)
        ]
    return same_vocabulary


def configuration_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the configurations in a model's folder, by file name: those of generation, tokenizer and processor.

    `config.json`, which is that of the model itself, is not among them.
    """
    return {file.name: read_json(file) for file in sorted(folder.glob("[!.]*_config.json"))}


def ids_in(values: Mapping[str, Any]) -> set[int]:
    """Collect all numbers in JSON values that are ids of tokens by their keys; some may be no token, such as -1.

    `values` are those of a configuration, such as {"eos_token_id": 2}. They are not changed.
    """
    ids = set[int]()

    def note(index: int) -> int:
        """Add a number to `ids`, and return it."""
        ids.add(index)
        return index

    # `_replaced` calls `note` with each id that it meets. The copy that it makes is not needed.
    _replaced(values, note, are_ids=False)
    return ids


def renumbered(values: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Copy JSON values with the new ids of tokens; numbers that have no new id stay, such as -1.

    `values` are those of a configuration, such as {"eos_token_id": 2}; they are not changed. Entries of removed tokens
    are left out of lists and maps of tokens (`added_tokens_decoder`, `forced_decoder_ids`, `lang_to_id`,
    `task_to_id`).
    """

    def new_id(index: int) -> int:
        """Return the new id of a token, by `new_ids`; a number that has none stays."""
        return new_ids.get(index, index)

    # False: a number is an id only under a key that says so, such as "eos_token_id".
    changed: dict[str, Any] = _replaced(values, new_id, are_ids=False)
    # The lists and maps of tokens still hold removed tokens, under their old ids. So each is made anew, from `values`.
    if values.get("added_tokens_decoder"):
        # In JSON, the ids that are keys are text.
        changed["added_tokens_decoder"] = {
            str(new_ids[int(old)]): token
            for old, token in values["added_tokens_decoder"].items()
            if int(old) in new_ids
        }
    for key in _MAPS_TO_IDS:
        if isinstance(values.get(key), dict):
            changed[key] = {
                word: new_ids[old] for word, old in values[key].items() if old in new_ids
            }
    if isinstance(values.get(_PAIRS_WITH_IDS), list | tuple):
        changed[_PAIRS_WITH_IDS] = [
            [position, new_ids.get(old)]
            for position, old in values[_PAIRS_WITH_IDS]
            if old is None or old in new_ids  # None: no token is forced at this position
        ]
    return changed


def _replaced(value: Any, change: Callable[[int], int], are_ids: bool) -> Any:
    """Copy a JSON value, and replace all ids of tokens in it by what `change` returns of them.

    `are_ids`: all numbers in `value` are ids, because it stands under a key that says so. If not, only those under such
    a key in `value` are. Begin with False for a whole file.
    """
    if isinstance(value, dict):
        return {key: _replaced_at(key, inner, change, are_ids) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(inner, change, are_ids) for inner in value)  # of the same type
    is_number = type(value) is int  # and not bool
    if are_ids and is_number:
        return change(value)
    return value


def _replaced_at(key: Any, value: Any, change: Callable[[int], int], are_ids: bool) -> Any:
    """Copy the value of a key of a JSON object, and replace the ids in it by what `change` returns of them.

    `key` says whether the numbers in `value` are ids, such as "eos_token_id" or "lang_to_id" (`_MAPS_TO_IDS`). If
    `are_ids`, they are ids in any case, because a key around it says so. Of pairs (`_PAIRS_WITH_IDS`), only the second
    number is an id.
    """
    if key == _PAIRS_WITH_IDS and isinstance(value, list | tuple):
        return [[position, _replaced(index, change, are_ids=True)] for position, index in value]
    is_key_of_ids = key in _MAPS_TO_IDS or _KEYS_OF_IDS.fullmatch(str(key)) is not None
    return _replaced(value, change, are_ids=are_ids or is_key_of_ids)


class ChatTemplateError(ValueError):
    """A chat template does not end."""


def ids_of_chat_template(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Collect the ids of all tokens that a tokenizer's chat template writes around messages; none without a template.

    A template is code of other people. If it refuses a conversation, that conversation adds no ids. If it runs more
    than `_MOST_STEPS` lines, it is taken to run forever, and `ChatTemplateError` is raised. Changes nothing that lasts.
    """
    ids = set[int]()
    # The messages are empty, so all text is the template's own. Many templates refuse the role "system".
    for roles in (("system", "user", "assistant"), ("user", "assistant")):
        messages = [{"role": role, "content": ""} for role in roles]
        try:
            with _limited_templates():
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
        except ChatTemplateError:
            raise
        except Exception:  # whatever its code raises; or there is no template
            continue
        ids.update(tokenizer.encode(text, add_special_tokens=False))
    return ids


@contextmanager
def _limited_templates() -> Iterator[None]:
    """Raise `ChatTemplateError` in the template that runs more than `_MOST_STEPS` lines.

    The lines are counted by the trace function of this thread (`sys.settrace`), which Python calls for each function
    and line that runs inside the `with`. The function that was there before is put back afterwards.
    """
    steps = 0  # lines of templates that have run

    def count(frame: FrameType, event: str, argument: Any) -> Any:  # noqa: ARG001, as Python calls it
        """Count a step of a template in `steps`, and raise if there are too many; Python calls this.

        `frame` is the function that runs. Returns itself if the function is a template's, so that Python calls this for
        its lines, too; `None` if it is another one, whose lines are not counted.
        """
        nonlocal steps
        if frame.f_code.co_filename != "<template>":  # the name that Jinja gives to its code
            return None
        steps += 1
        if steps > _MOST_STEPS:
            raise ChatTemplateError(
                f"the chat template does not end: it runs more than {_MOST_STEPS:,} lines for a few empty messages"
            )
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
