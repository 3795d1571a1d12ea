"""Texts with images become sequences, whatever form of turns the chat template of a processor takes."""

import pytest
from media_models import IMAGE, MARK, save_llava_folder
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from optimum_fista.text.images import image_sequences
from optimum_fista.text.text_source import TextSource

ONLY_STRINGS = {
    "fails": "{% for turn in messages %}{{ turn['content'] + ' .' }}{% endfor %}",
    "refuses": (
        "{% for turn in messages %}{% if turn['content'] is not string %}{{ raise_exception('strings only') }}"
        "{% endif %}{{ turn['content'] + ' .' }}{% endfor %}"
    ),
    "prints": "{% for turn in messages %}{{ turn['content'] }} .{% endfor %}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with images, and its processor."""
    return save_llava_folder(tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("template", ONLY_STRINGS.values(), ids=ONLY_STRINGS)
def test_a_chat_template_that_takes_only_strings_gets_the_image_token_in_the_string(
    folder, tmp_path, template
):
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = template
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    text = TextSource("pictures", ["a b c"], images=[[tmp_path / "picture.png"]])

    (batch,) = image_sequences(
        processor, AutoConfig.from_pretrained(folder), text, num_samples=1, length=64, seed=0
    )

    ids = batch["input_ids"]
    expected = processor.tokenizer(MARK + "\na b c .", return_tensors="pt").input_ids
    num_tokens_of_image = 4
    assert (ids == IMAGE).sum() == num_tokens_of_image
    assert ids[ids != IMAGE].tolist() == expected[expected != IMAGE].tolist()
    assert batch["pixel_values"].shape == (1, 3, 8, 8)


def test_a_template_for_strings_and_a_processor_without_an_image_token_is_refused(folder, tmp_path):
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = ONLY_STRINGS["fails"]
    processor.image_token = None
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    text = TextSource("pictures", ["a b c"], images=[[tmp_path / "picture.png"]])

    with pytest.raises(
        ValueError, match=r"takes only strings, .* write its image token into every"
    ):
        image_sequences(
            processor, AutoConfig.from_pretrained(folder), text, num_samples=1, length=64, seed=0
        )
