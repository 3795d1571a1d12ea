import itertools

import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokens

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.evaluate.verification import VerificationError, verify_checkpoint
from optimum_fista.packed.format import pack
from optimum_fista.solve.patterns import Pairs, parse_pattern

PAIRS = parse_pattern("4:8-pairs")
CHOICES = [[index in kept for index in range(4) for _ in "ab"] for kept in itertools.combinations(range(4), 2)]
"""All masks of a group."""


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_text_and_counts():
    assert Pairs(0.5) == PAIRS
    assert (PAIRS.text, str(PAIRS), PAIRS.sparsity, PAIRS.num_kept((3, 24))) == ("4:8-pairs", "4:8-pairs", 0.5, 36)
    assert parse_pattern("4:8") != PAIRS
    with pytest.raises(ValueError, match="rows of 12 inputs, which 4:8-pairs does not divide"):
        PAIRS.require_shape((3, 12))


def test_keeps_the_pairs_with_the_largest_sums_of_scores():
    scores = random(6, 24).square()
    choices = torch.tensor(CHOICES)
    best = (scores.view(-1, 8) @ choices.T.float()).argmax(1)  # of all masks of a group
    assert torch.equal(PAIRS.mask(scores), choices[best].view(6, 24))
    assert torch.equal(PAIRS.mask_of(scores.sqrt()), choices[best].view(6, 24))
    assert int(PAIRS.mask(torch.ones(6, 24)).sum()) == 72


def test_squares_add_up_and_magnitudes_do_not():
    row = torch.tensor([[3.0, 0.0, 2.2, 2.2, 2.0, 0.0, 1.9, 1.9]])
    assert PAIRS.mask_of(row).tolist() == [
        [True, True, True, True, False, False, False, False]
    ]  # sums 9, 9.68, 4, 7.22


def test_violation_names_the_pair_that_is_torn():
    mask = torch.tensor([CHOICES[0] + CHOICES[5]])
    assert PAIRS.violation(mask) is None
    mask[0, 8:12] = torch.tensor([True, False, True, False])
    mask[0, 12:] = torch.tensor([True, True, False, False])
    assert PAIRS.violation(mask) == "row 0 keeps only one weight of the pair of inputs 8 and 9"
    assert PAIRS.violation(torch.tensor([CHOICES[0] + [True] * 6 + [False] * 2])).startswith("keeps 10 weights, but")


def test_a_packed_mask_takes_one_bit_a_weight():
    mask = PAIRS.mask_of(random(4, 64))
    packed = pack(random(4, 64) * mask, mask, PAIRS.n_of_m)
    assert packed.mask.shape == (4, 8)


def test_streamed_verified_packed_and_reported(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    config = FistaPruningConfig(pattern="4:8-pairs", overrides={"*.q_proj": "2:4"}, method="sparsegpt")
    assert FistaPruningConfig.from_dict(config.to_dict()) == config
    batches = list(tiny_tokens().split(4))
    pruned = tmp_path / "pruned"
    report = FistaPruner(config, progress=False).prune(tmp_path / "model", batches, output_dir=pruned)
    assert {operator.pattern for operator in report.operators} == {"4:8-pairs", "2:4"}
    assert "| pattern | 4:8-pairs |" in (pruned / "README.md").read_text()
    proven = verify_checkpoint(pruned)
    assert proven.num_zeros * 2 == proven.num_weights

    report_file = pruned / "fista" / "report.json"
    report_file.write_text(report_file.read_text().replace('"2:4"', '"4:8-pairs"'))
    with pytest.raises(VerificationError, match=r"q_proj.*its mask row \d+"):
        verify_checkpoint(pruned)
