"""Waiting threads of OpenMP: what the program sets, and what it leaves to the user."""

import subprocess
import sys

import pytest

from upstep_fast.runtime.thread_waits import limit_spinning


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "0"}, {"GOMP_SPINCOUNT": "0"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_what_the_user_set_counts(given, expected):
    limit_spinning(given)
    assert given == expected


def test_the_program_sets_it_before_torch_is_imported():
    code = (
        "import os, sys; sys.argv = ['upstep-fast', '--version']\n"
        "from upstep_fast.runtime import thread_waits as t; set = t.limit_spinning\n"
        "t.limit_spinning = lambda e: (set(e), print(e['GOMP_SPINCOUNT'], 'torch' in sys.modules))\n"
        "from upstep_fast.cli import main; main()"
    )
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "1000 False", done.stderr
