import pytest

from optimum_fista.removal import parts_removal


@pytest.fixture
def fails_at_the_end(monkeypatch):
    """A run is interrupted once its model in memory has become smaller."""
    shrink = parts_removal.shrink_model

    def shrink_and_fail(*arguments):
        shrink(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(parts_removal, "shrink_model", shrink_and_fail)
