"""--slow: also the tests that take minutes, or that need root, Slurm or much compilation."""

import math
import time

import pytest

BEGIN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="also run the slow tests, after the others"
    )
    parser.addoption("--slow-until", type=float, default=math.inf, metavar="SECONDS",
                     help="start no slow test later than this after the beginning")  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs only with --slow")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="only with --slow"))


def pytest_runtest_setup(item):
    late = time.monotonic() - BEGIN > item.config.getoption("--slow-until")
    if late and item.get_closest_marker("slow"):
        pytest.skip("no time left for it on this machine")
