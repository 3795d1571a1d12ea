import pytest

from optimum_fista.prune import removal


@pytest.fixture(autouse=True, scope="module")
def _no_pictures(request):
    """Many models are saved, those of a module's fixtures as well; other processes draw their pictures, though."""
    if request.path.stem not in ("test_ranks", "test_streamed"):
        request.getfixturevalue("no_pictures")


@pytest.fixture
def fails_at_the_end(monkeypatch):
    """A run is interrupted once its model in memory has become smaller."""
    shrink = removal.shrink_model

    def shrink_and_fail(*arguments):
        shrink(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(removal, "shrink_model", shrink_and_fail)
