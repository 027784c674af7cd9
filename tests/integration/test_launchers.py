"""As users start it: Lightning's own launchers, and torchrun."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("launched_script.py")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(command, **environment):
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
        **environment,
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("strategy", ["muon_zero1", "muon_zero1_spawn"])
@pytest.mark.parametrize("api", ["trainer", "fabric"])
def test_lightnings_launchers(api, strategy):
    out = launch([sys.executable, str(SCRIPT), api, strategy])
    assert out.count("replicas agree on 2 processes") == 1


def test_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    out = launch([*command, str(SCRIPT), "trainer", "muon_zero1"])
    assert out.count("replicas agree on 2 processes") == 1
