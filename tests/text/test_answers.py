"""Tokens of answers are found in what chat templates write; the tests' tokenizer has a token for each character."""

import pytest
import torch
from tiny_llama import tiny_tokenizer
from tokenizers import processors

from optimum_fista.text import windows
from optimum_fista.text.answers import tokens_in_spans
from optimum_fista.text.text_source import TextSource
from optimum_fista.text.windows import calibration_windows, windows_with_answers

HEADER = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}[end]\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}[assistant]\n{% endif %}"
CHATML = HEADER + PROMPT
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
THINKING = HEADER + "{% if add_generation_prompt %}[assistant]\n[think]{% endif %}"
# an answer of nothing but a call of a tool
TOOLS = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ m.call }}[end]\n{% endfor %}" + PROMPT
)
MARKED = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}.{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
# without what was thought, unless it is the last turn, as some models of reasoning have it
REWRITING = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content if loop.last else 'short' }}[end]\n{% endfor %}"
    + PROMPT
)
# of its own if the conversation has none, as Qwen2.5 has
WITH_SYSTEM_PROMPT = (
    "{% if messages[0].role != 'system' %}[system]\nbe kind[end]\n{% endif %}" + CHATML
)

TURNS = [("system", "be kind"), ("user", "deep?"), ("assistant", "yes"), ("user", "tall?")]
TURNS += [("assistant", "no ")]


def conversation(*turns, **more):
    return tuple({"role": role, "content": content, **more} for role, content in turns)


def answers_in(template, turns, tokenizer=None):
    """The answers in the text of a conversation, by the tokens that count."""
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = template
    text = TextSource("chat.jsonl", ("not written yet",), conversations=(turns,))
    (written,) = text.written_by(tokenizer).documents
    length = len(written) + 1  # EOS

    tokens, answers = windows_with_answers(tokenizer, text, 1, length, seed=0)

    assert tokens[0].tolist() == [*tokenizer(written)["input_ids"], tokenizer.eos_token_id]
    assert not answers[0, -1]
    are_of_answers = answers[0].tolist()
    marked = [
        character if is_answer else "\0"
        for character, is_answer in zip(written, are_of_answers, strict=False)
    ]
    return [answer for answer in "".join(marked).split("\0") if answer]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["yes[end]", "no [end]"]),
        (BARE, ["yes", "no"]),
        (THINKING, ["yes[end]", "no [end]"]),
        (MARKED, ["yes.", "no ."]),
    ],
)
def test_an_answer_is_what_the_model_writes_itself(template, expected):
    assert answers_in(template, conversation(*TURNS)) == expected


def test_an_answer_without_content_is_found_after_the_words_that_ask_for_it():
    turns = conversation(("user", "sum?"), call="") + conversation(("assistant", ""), call="add(1)")

    assert answers_in(TOOLS, turns) == ["add(1)[end]"]


def test_a_conversation_may_begin_with_an_answer():
    assert answers_in(CHATML, conversation(("assistant", "hi"), ("user", "deep?"))) == ["hi[end]"]


def test_an_answer_that_repeats_the_question_is_found_in_its_own_turn():
    assert answers_in(BARE, conversation(("user", "yes"), ("assistant", "yes"))) == ["yes"]
    assert answers_in(BARE, conversation(("user", "hi"), ("user", "ho"))) == []


def test_an_answer_is_not_looked_for_in_the_words_before_it():
    of_one_letter = conversation(("user", "which?"), ("assistant", "a"))
    without_content = conversation(("user", "which?"), ("assistant", ""), ("user", "well?"))
    before_the_question = conversation(("assistant", "kind"), ("user", "how?"))
    begins_with_zero = conversation(("user", "how many?"), ("assistant", "0 or 1"))

    assert answers_in(BARE, of_one_letter) == ["a"]
    assert answers_in(HEADER, without_content) == ["[end]"]
    assert answers_in(WITH_SYSTEM_PROMPT, before_the_question) == ["kind[end]"]
    assert answers_in(BARE, begins_with_zero) == ["0 or 1"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHATML, ["  def f():\n    x[end]"]), (MARKED, ["  def f():\n    x."])],
)
def test_spaces_count_if_the_tokenizer_leaves_them_out_of_the_places_of_tokens(template, expected):
    trimming = tiny_tokenizer()
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = conversation(("user", "write"), ("assistant", "  def f():\n    x"))

    assert answers_in(template, turns, trimming) == expected


def test_a_template_that_refuses_the_first_turns_alone_is_refused_with_the_conversation():
    template = "{% if messages[-1].role == 'assistant' %}" + BARE
    template += "{% else %}{{ raise_exception('no answer') }}{% endif %}"

    with pytest.raises(
        ValueError, match=r"conversation 1: .* refuses the first 1 turns .*no answer"
    ):
        answers_in(template, conversation(("user", "deep?"), ("assistant", "yes")))


def test_a_template_that_rewrites_earlier_turns_is_refused_if_there_are_some():
    assert answers_in(REWRITING, conversation(("assistant", "hi"))) == ["hi[end]"]

    with pytest.raises(
        ValueError,
        match=r"'chat\.jsonl', conversation 1: the model's chat template writes a turn otherwise when others follow",
    ):
        answers_in(REWRITING, conversation(*TURNS))


def test_a_template_that_changes_an_answer_is_refused():
    with pytest.raises(ValueError, match=r"template changes the answer in turn 3"):
        answers_in(BARE.replace("m.content", "m.content | upper"), conversation(*TURNS))


@pytest.fixture
def mixed():
    """A text of conversations and plain documents, and the tokenizer of its model."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    conversations = (conversation(*TURNS[1:3]), (), conversation(*TURNS[3:]), ())
    documents = ("deep? yes", "plain text", "tall? no", "more of it")
    return tokenizer, TextSource("chat.jsonl", documents, conversations=conversations)


def test_documents_that_are_no_conversations_count_whole(mixed):
    tokenizer, text = mixed
    num_tokens = sum(len(document) + 1 for document in text.written_by(tokenizer).documents)

    tokens, answers = windows_with_answers(tokenizer, text, 1, num_tokens, seed=0)

    num_expected = len("plain text") + len("more of it") + len("yes[end]") + len("no [end]")
    assert int(answers.sum()) == num_expected
    assert not answers[tokens == tokenizer.eos_token_id].any()
    assert "plain text" in tokenizer.decode(tokens[answers])


def test_the_windows_are_those_of_calibration(mixed):
    tokenizer, text = mixed

    tokens, answers = windows_with_answers(tokenizer, text, 5, 12, seed=3, held_out=2)

    assert torch.equal(tokens, calibration_windows(tokenizer, text, 5, 12, 3, held_out=2))
    assert answers.shape == tokens.shape


def test_bos_at_the_start_of_a_window_is_of_no_answer(mixed):
    tokenizer, text = mixed
    tokenizer.add_bos_token = True

    tokens, answers = windows_with_answers(tokenizer, text, 5, 12, seed=3)

    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert not answers[:, 0].any()
    assert torch.equal(tokens, calibration_windows(tokenizer, text, 5, 12, 3))


def test_answers_of_a_long_document_are_found_piece_by_piece(monkeypatch):
    turns = conversation(("user", "how deep is it?"), ("assistant", "as deep as can be " * 5))
    expected = answers_in(CHATML, turns)

    monkeypatch.setattr(windows, "_TOKENISED_TOGETHER", 8)

    assert answers_in(CHATML, turns) == expected == ["as deep as can be " * 5 + "[end]"]


def test_a_token_counts_if_one_of_its_characters_is_in_a_span():
    offsets = [(0, 3), (3, 5), (5, 5), (5, 7), (7, 9), (9, 12)]

    assert tokens_in_spans(offsets, [(4, 7), (11, 12)]).tolist() == [
        False,
        True,
        False,
        True,
        False,
        True,
    ]
    assert tokens_in_spans(offsets, []).tolist() == [False] * 6
    assert tokens_in_spans([], [(0, 2)]).tolist() == []


def test_a_text_without_conversations_has_no_answers():
    with pytest.raises(ValueError, match=r"'sea\.txt' has no conversations \(messages\)"):
        windows_with_answers(tiny_tokenizer(), TextSource("sea.txt", ("plain",)), 1, 4, 0)


def test_a_tokenizer_that_knows_no_places_is_refused(mixed, monkeypatch):
    tokenizer, text = mixed
    monkeypatch.setattr(type(tokenizer), "is_fast", False)

    with pytest.raises(ValueError, match="tokenizer is a slow one"):
        windows_with_answers(tokenizer, text, 1, 4, 0)
