import pytest

from optimum_fista.prune import removal


@pytest.fixture
def fails_at_the_end(monkeypatch):
    """A run is interrupted once its model in memory has become smaller."""
    shrink = removal.shrink_model

    def shrink_and_fail(*arguments):
        shrink(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(removal, "shrink_model", shrink_and_fail)
