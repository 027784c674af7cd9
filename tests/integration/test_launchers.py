"""As users start it: Lightning's own launchers, torchrun, ``fabric run``, and the variables of a SLURM task."""

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


def with_variables(**variables):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), **variables}


def launch(command):
    env = with_variables()
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


def test_fabric_run():
    command = [sys.executable, "-m", "lightning.fabric.cli", "--accelerator=cpu", "--devices=2"]
    out = launch([*command, str(SCRIPT), "fabric_run", "muon_zero1"])
    assert out.count("replicas agree on 2 processes") == 1


def test_tasks_of_slurm():
    job = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "train",
    }
    env = with_variables(**job)
    command = [sys.executable, str(SCRIPT), "trainer", "muon_zero1"]
    tasks = [
        subprocess.Popen(
            command, env={**env, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}, stdout=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    try:
        outs = [task.communicate(timeout=240)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    assert [task.returncode for task in tasks] == [0, 0]
    assert "".join(outs).count("replicas agree on 2 processes") == 1
