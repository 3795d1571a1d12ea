import pytest
import torch

from optimum_fista.solve.patterns import NOfM, Unstructured
from optimum_fista.solve.rotation import Readers, Writers, random_rotation, train_rotation

TWO_OF_FOUR = NOfM(0.5, n=2, m=4)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_readers(seed=0):
    gram = randn(64, 8, seed=seed).T @ randn(64, 8, seed=seed)
    weights = [randn(8, 8, seed=seed + 1), randn(12, 8, seed=seed + 2)]
    costs = [randn(8, seed=seed + 3).square(), randn(12, seed=seed + 4).square() * 5]
    return Readers(weights, costs, torch.linalg.inv(gram))


def some_writers(seed=0):
    weights = [randn(8, 12, seed=seed + 5), randn(8, 12, seed=seed + 6)]
    costs = randn(8, 20, seed=seed + 7)
    return Writers(weights, costs @ costs.T, [randn(12, seed=seed + 8).square(), randn(12, seed=seed + 9).square()])


def removed_by_hand(scores):
    """The two smallest of every four in a row."""
    return sum(sum(sorted(row[i : i + 4])[:2]) for row in scores.tolist() for i in range(0, len(row), 4))


def floored(costs):
    costs = costs / costs.mean()
    return costs.clamp_min(0.09)  # 0.3 squared


def test_what_is_removed_of_readers():
    readers, rotation = some_readers(), random_rotation(8, seed=1).float()
    inverse = rotation.T @ readers.inverse @ rotation  # of the inputs R^T x
    costs = floored(torch.cat(list(readers.output_weights)))
    scores = (torch.cat(list(readers.weights)) @ rotation).square() / inverse.diagonal() * costs[:, None]
    assert float(readers.error(rotation, TWO_OF_FOUR)) == pytest.approx(removed_by_hand(scores), rel=1e-4)


def test_what_is_removed_of_writers():
    writers, rotation = some_writers(), random_rotation(8, seed=1).float()
    costs = floored((rotation.T @ writers.output_weights @ rotation).diagonal())
    scores = (
        (rotation.T @ torch.cat(list(writers.weights), 1)).square() * torch.cat(list(writers.inputs)) * costs[:, None]
    )
    assert float(writers.error(rotation, TWO_OF_FOUR)) == pytest.approx(removed_by_hand(scores), rel=1e-4)


@pytest.mark.parametrize("group", [some_readers(), some_writers()], ids=["readers", "writers"])
def test_a_share_stands_for_the_whole(group):
    generator, identity = torch.Generator().manual_seed(0), torch.eye(8)
    drawn = [float(group.error(identity, TWO_OF_FOUR, 0.25, generator)) for _ in range(800)]
    assert len(set(drawn)) > 5
    assert torch.tensor(drawn).mean() == pytest.approx(float(group.error(identity, TWO_OF_FOUR)), rel=0.1)


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Unstructured(0.5)], ids=str)
def test_training_finds_a_basis_in_which_weights_are_sparse(pattern):
    hidden = random_rotation(8, seed=3).float()
    sparse = randn(64, 8) * pattern.mask(randn(64, 8, seed=1).abs())
    group = Readers([sparse @ hidden.T], [torch.ones(64)], torch.eye(8))
    found, ratio = train_rotation([group], pattern, steps=600, learning_rate=0.03, seed=0)
    torch.testing.assert_close(found @ found.T, torch.eye(8, dtype=torch.float64))
    assert ratio < 0.35
    assert float(group.error(found.float(), pattern) / group.error(torch.eye(8), pattern)) == pytest.approx(ratio)


def test_training_comes_as_far_as_it_did():
    """Another number of groups, schedule or beta of Adam changes 0.4% or more, noise of 1e-5 in the weights 0.01%."""
    groups = [some(seed) for seed in range(0, 200, 20) for some in (some_readers, some_writers)]
    _, ratio = train_rotation(groups, TWO_OF_FOUR, steps=60, learning_rate=0.03, seed=0)
    assert ratio == pytest.approx(0.71607, rel=1e-3)


def test_the_mean_can_be_kept():
    groups = [some_readers(), some_writers()]
    found, ratio = train_rotation(groups, TWO_OF_FOUR, steps=40, learning_rate=0.02, seed=0, keeps_mean=True)
    identity = torch.eye(8)
    left = [float(g.error(found.float(), TWO_OF_FOUR) / g.error(identity, TWO_OF_FOUR)) for g in groups]
    assert ratio == pytest.approx((left[0] * left[1]) ** 0.5, rel=1e-4)
    assert sum(left) / 2 > ratio * 1.0005  # no arithmetic mean
    ones = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(found @ ones, ones)
    torch.testing.assert_close(found.T @ ones, ones)
    assert 0.3 < ratio < 0.9
    torch.testing.assert_close(random_rotation(8, 0, keeps_mean=True) @ ones, ones)


def test_the_seed_decides_what_is_drawn():
    runs = [
        train_rotation([some_readers(), some_writers()], TWO_OF_FOUR, steps=5, learning_rate=0.01, seed=seed)[0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_progress_says_what_is_removed():
    seen = []
    train_rotation([some_readers()], TWO_OF_FOUR, steps=60, learning_rate=0.02, seed=0, progress=seen.append)
    assert len(seen) == 60
    assert 0.3 < seen[0] < 3  # a quarter of the rows stands for all
    assert sum(seen[-10:]) < sum(seen[:10])


def test_nothing_to_remove_is_left_as_it_is():
    nothing = Readers([torch.zeros(4, 8)], [torch.ones(4)], torch.eye(8))
    found, ratio = train_rotation([nothing], TWO_OF_FOUR, steps=3, learning_rate=0.1, seed=0)
    assert torch.equal(found, torch.eye(8, dtype=torch.float64))
    assert ratio == 1
    unfelt = Readers([randn(4, 8)], [torch.zeros(4)], torch.eye(8))  # the loss does not depend on their outputs
    assert 0 < float(unfelt.error(torch.eye(8), TWO_OF_FOUR)) < float(randn(4, 8).square().sum())
    found, _ = train_rotation([nothing, some_readers()], TWO_OF_FOUR, steps=3, learning_rate=0.1, seed=0)
    assert bool(torch.isfinite(found).all())
