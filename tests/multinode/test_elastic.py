"""A job under torchrun that loses one of three machines goes on with two, where it was, on the same batches."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.hosts import wait_all
from tests.integration.test_launchers import free_port
from tests.integration.test_lightning import assert_close
from tests.multinode.elastic_node import KILLED_AFTER

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "elastic" / "train.py"
DOCUMENT = (ROOT / "docs" / "elastic.md").read_text()
NODE = Path(__file__).with_name("elastic_node.py")
SAVE_EVERY, NUM_STEPS, TIMEOUT_S = 5, 30, 200
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def losses(output):
    """By step and number of processes."""
    lines = re.findall(r"step (\d+) on (\d) processes: loss ([\d.]+)", output)
    return {(int(step), int(processes)): float(loss) for step, processes, loss in lines}


def saved_weights(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {step: loss for (step, _), loss in losses(done.stdout).items()}, saved_weights(folder)


def torchrun(number, port, folder):
    """The document's command, on this machine, and its environment."""
    (command,) = re.findall(r"```bash\n(.*?)\n```", DOCUMENT)
    setting, program, *arguments, script, _ = shlex.split(command)
    assert (program, script) == ("torchrun", "train.py")
    # it knows by the host's name whether it is the rendezvous'; 15 seconds of silence are long for a test
    details = f",is_host={number == 0},keep_alive_interval=1,keep_alive_max_attempt=2"
    changed = {"--rdzv-endpoint=machine-0:29400": f"--rdzv-endpoint=127.0.0.1:{port}"}
    arguments = [changed.get(argument, argument) for argument in arguments]
    arguments = [argument + details * argument.startswith("--rdzv-conf") for argument in arguments]
    name, value = setting.split("=")
    return [sys.executable, "-m", "torch.distributed.run", *arguments, str(NODE), str(folder)], {name: value}


def run_on_three(folder, lost):
    """Exit codes and outputs."""
    port = free_port()
    logs = [folder / f"log-{number}" for number in range(3)]
    agents = []
    for number in range(3):
        command, environment = torchrun(number, port, folder)
        environment = {**ENVIRONMENT, **environment, **({"IS_LOST": "1"} if number == lost else {})}
        with logs[number].open("w") as log:
            agents.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log))
    try:
        codes = wait_all(agents, TIMEOUT_S)
    finally:
        for agent in agents:
            agent.terminate()  # it ends its worker
            agent.wait()
    return codes, [log.read_text() for log in logs]


def test_the_documents_script_is_the_one_that_runs():
    assert re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL) == [SCRIPT.read_text()]


def test_a_lost_machine(one_process, tmp_path):
    expected, expected_weights = one_process
    codes, outputs = run_on_three(tmp_path, lost=2)
    assert codes == [0, 0, -9], "\n".join(outputs)
    found = losses("".join(outputs))
    resumed_at = KILLED_AFTER // SAVE_EVERY * SAVE_EVERY
    assert {step for step, processes in found if processes == 3} == set(range(1, KILLED_AFTER + 1))
    assert {step for step, processes in found if processes == 2} == set(range(resumed_at + 1, NUM_STEPS + 1))
    for (step, _), loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5, abs=1e-6)
    assert_close(saved_weights(tmp_path), expected_weights)
