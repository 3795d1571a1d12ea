"""The learning rates of a recovery."""

import pytest

from optimum_fista.train.distillation import Schedule


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 400])
@pytest.mark.parametrize("began", [0, 7])
def test_the_rate_rises_for_a_twentieth_of_the_steps_and_then_falls_to_zero(steps, began):
    schedule = Schedule(began + steps)
    schedule.began = began
    schedule.share = 0.25

    # also of the step after the last one
    shares = [schedule(step) for step in range(began, began + steps + 1)]

    top = shares.index(max(shares))
    assert shares[top] == 0.25
    assert top + 1 == max(1, round(steps / 20))
    assert 0 < shares[0] <= 1 / (top + 1)
    assert shares[:top] == sorted(shares[:top])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert min(shares[:-1]) > 0  # every step trains
    assert shares[-1] == pytest.approx(0, abs=1e-12)
