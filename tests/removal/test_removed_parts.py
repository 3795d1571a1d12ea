"""What the plan, the report and the card say of how many parts are removed."""

import pytest

from optimum_fista.removal.removed_parts import RemovedParts
from optimum_fista.solve.patterns import PartShare


@pytest.mark.parametrize(
    ("share", "number", "kept", "text"),
    [
        (
            PartShare("channels", 0.25),
            4864,
            3584,
            "1280 of 4864 channels of every decoder layer (26.32%; asked for: 25%; 3584 stay, a multiple of 128)",
        ),
        (
            PartShare("expert_channels", 0.3),
            1536,
            1088,
            "448 of 1536 channels of every expert (29.17%; asked for: 30%; 1088 stay, no multiple of 128)",
        ),
        # 192 is no multiple of 128 now
        (
            PartShare("channels", 0.33),
            192,
            128,
            "64 of 192 channels of every decoder layer (33.33%; asked for: 33%)",
        ),
        (PartShare("heads", 0.5), 256, 128, "128 of 256 heads of every decoder layer (50.00%)"),
    ],
)
def test_the_text_says_whether_a_multiple_of_128_channels_stays_if_the_model_has_one(
    share, number, kept, text
):
    assert share.num_kept(number) == kept
    assert str(RemovedParts(share, number, kept)) == text
