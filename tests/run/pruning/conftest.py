import pytest


@pytest.fixture(autouse=True)
def _one_picture(one_picture):
    """Many models are saved."""
