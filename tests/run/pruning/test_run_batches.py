import warnings

import pytest
import torch
from pruning import prune, same, weights
from tiny_llama import tiny_llama
from torch.utils.data import DataLoader

from optimum_fista import FistaPruner, FistaPruningConfig


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("error_correction", ["none", "intra", "full"])
def test_padding_counts_nowhere(tokens, side, error_correction):
    short, long = tokens[:, :10], tokens.flip(0)
    padding = torch.full((8, 6), 5)
    ones, zeros = torch.ones_like(short), torch.zeros_like(padding)
    order = (padding, short) if side == "left" else (short, padding)
    mask = torch.cat((zeros, ones) if side == "left" else (ones, zeros), dim=1)
    padded_batches = [
        {
            "input_ids": torch.cat([torch.cat(order, dim=1), long]),
            "attention_mask": torch.cat([mask, torch.ones_like(long)]),
        }
    ]
    options = {"error_correction": error_correction, "method": "sparsegpt"}
    padded = prune(tiny_llama(), padded_batches, **options)
    plain = prune(tiny_llama(), [short, long], **options)
    assert padded.calibration == plain.calibration
    assert padded.calibration["num_tokens"] == 8 * 10 + 8 * 16
    assert padded.calibration["num_sequences"] == 16
    for left, right in zip(padded.operators, plain.operators, strict=True):
        assert left.num_tokens == right.num_tokens == 208
        assert left.fit_error == pytest.approx(right.fit_error, rel=1e-3)


def test_every_kind_of_loader_gives_the_same_bits(tokens):
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    loaders = [
        tokens.split(2),
        list(DataLoader(rows, batch_size=2)),
        DataLoader(rows, batch_size=2),
        (batch for batch in tokens.split(2)),
        [batch.tolist() for batch in tokens.split(2)],
    ]
    results = []
    for loader in loaders:
        model = tiny_llama()
        report = prune(model, loader, method="wanda")
        results.append((weights(model), report.calibration))
    for values, calibration in results[1:]:
        assert same(values, results[0][0])
        assert calibration == results[0][1]


def test_batch_size_hardly_matters(tokens):
    errors = []
    for batch_size in (1, 3, 8):
        report = prune(tiny_llama(), tokens.split(batch_size), method="sparsegpt")
        errors.append(torch.tensor([o.fit_error for o in report.operators]))
    assert torch.allclose(errors[0], errors[1], rtol=1e-4, atol=0)
    assert torch.allclose(errors[0], errors[2], rtol=1e-4, atol=0)


def test_too_few_tokens_are_warned_about_once(llama, tokens):
    with pytest.warns(
        UserWarning, match=r"32 calibration tokens for the 48 inputs of .*down_proj.*rank-deficient"
    ) as seen:
        report = FistaPruner(FistaPruningConfig(method="wanda"), progress=False).prune(llama, tokens[:2])
    assert len(seen) == 1
    assert report.warnings == [str(seen[0].message)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prune(tiny_llama(), tokens, method="wanda").warnings == []
