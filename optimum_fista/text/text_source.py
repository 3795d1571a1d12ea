"""Documents of a source of text, and conversations among them.

`text.sources` reads files, and `text.hub_texts` data sets of the Hub; both make a `TextSource`. A *conversation* is a
document with turns, each with a role and a content (`messages`). The model's own chat template writes it as text, when
the tokenizer is known (`TextSource.written_by`).
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "test"]
# Turns of a conversation: each has a "role", such as "user", and a "content", a text.
Conversation: TypeAlias = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class TextSource:
    """Documents to tokenise."""

    name: str  # of the file, or the data set's usual name
    documents: tuple[str, ...]
    # between two documents when the source is read as one text
    separator: str = "\n\n"
    # that perplexity is measured on, by the literature's protocol; None: all
    max_windows: int | None = None
    # image files of each document; () if no document has any
    images: tuple[tuple[Path, ...], ...] = ()
    # turns of each document, () of one that is plain text; () if no document is a conversation
    conversations: tuple[Conversation, ...] = ()

    def written_by(self, tokenizer: "PreTrainedTokenizerBase") -> "TextSource":
        """Return this text with its conversations written by the chat template of `tokenizer`, that of the model.

        The documents in `self.conversations` are written anew, with the special tokens of the template; until then,
        their entries in `self.documents` are the contents of their turns. The caller's objects stay as they are.
        ValueError if there are conversations, and the tokenizer has no template, or the template refuses one. Its error
        names the text by `self.name`.
        """
        if not self.conversations:
            return self
        if not tokenizer.chat_template:
            raise ValueError(
                f"text {self.name!r} has conversations (messages), and the model's tokenizer has no chat template: "
                "pass a text without them, or a chat model."
            )
        documents = list(self.documents)
        for number, turns in enumerate(self.conversations):
            if turns:
                try:
                    written = tokenizer.apply_chat_template(list(turns), tokenize=False)
                except Exception as error:  # of the template, which is code of other people
                    raise ValueError(
                        f"text {self.name!r}: the model's chat template refuses conversation {number + 1} "
                        f"({type(error).__name__}: {error}): remove or change it."
                    ) from error
                documents[number] = str(written)
        return replace(self, documents=tuple(documents), conversations=())

    @property
    def joined(self) -> str:
        """The documents as one text."""
        return self.separator.join(self.documents)

    @property
    def sha256(self) -> str:
        """Hex digest of the joined text in UTF-8: equal for equal texts, whatever file they came from."""
        # surrogatepass: a text that was made in Python may hold half of a surrogate pair
        return hashlib.sha256(self.joined.encode("utf-8", "surrogatepass")).hexdigest()


def read_turns(messages: Any, place: str) -> tuple[str, Conversation]:
    """Check the turns of a conversation; returns their contents as one text, and the turns with contents as text.

    `messages` should be a list of objects with a "role" and a "content": text, or a list of parts with texts, such as
    {"type": "text", "text": "Hello"}. `place` says where they come from, for the ValueError if they are something else.
    `messages` stays as it is.
    """
    is_conversation = isinstance(messages, list) and len(messages) > 0
    if not is_conversation or not all(_is_turn(message) for message in messages):
        raise ValueError(
            f'{place}: found {str(messages)[:80]}; "messages" must be a list of objects, each with a string under '
            '"role" and text under "content" (images and sounds are not read from conversations).'
        )

    turns = list[dict[str, Any]]()
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        turns.append({**message, "content": content})
    contents = "\n\n".join(turn["content"] for turn in turns)
    return contents, tuple(turns)


def _is_turn(message: Any) -> bool:
    """Tell whether a message has a role, and a content of text or of parts with texts."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
    return isinstance(content, str)
