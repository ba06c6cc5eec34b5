"""Where Ai2's packages are kept between test sessions."""

import pathlib

import pytest


@pytest.fixture(scope="session")
def ai2_packages(pytestconfig: pytest.Config) -> pathlib.Path:
    """The folder for `ai2.install`."""
    return pytestconfig.cache.mkdir("ai2")
