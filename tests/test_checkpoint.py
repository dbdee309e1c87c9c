"""A run can be killed, stopped, moved to another layout and continued."""

import json
import sys

import pytest
from ranks import ROOT, run


@pytest.mark.parametrize(
    "check", ["controls", "resume_pairs", "refusals", "signals", "faults", "kills"]
)
def test_forks(tmp_path, check):
    code, output = run([sys.executable, ROOT / "tests" / "forks.py", check, tmp_path], 300)
    assert code == 0, output
