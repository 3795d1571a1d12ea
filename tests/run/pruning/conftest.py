import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_picture(one_picture):
    """Many models are saved, those of a module's fixtures as well."""
