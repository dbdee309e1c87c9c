"""--slow: also the tests that take minutes, or that need root, Slurm or much compilation."""

import os

import pytest

from ranks import ENVIRONMENT, STARTED

os.environ |= ENVIRONMENT  # for the other processes that tests start, too


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="also run the slow tests, after the others"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs only with --slow")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="only with --slow"))


@pytest.fixture(autouse=True)
def no_ranks_left():
    """A test that fails while its ranks run leaves none behind."""
    yield
    for job in STARTED:
        job.end()
