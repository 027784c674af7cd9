"""Two hosts with addresses of their own: started as users do, measured on the wire, and one of them lost."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.hosts import Hosts, permitted, wait_all
from benchmarks.two_hosts.__main__ import run as compare
from benchmarks.two_hosts.report import figures
from tests.integration.test_lightning import assert_close, reference
from tests.lightning_runs import fit
from tests.multinode.node import KILLED_AFTER, SAVE_EVERY, STEPS

_PERMITTED, _REASON = permitted()
pytestmark = pytest.mark.skipif(not _PERMITTED, reason=_REASON)

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("node.py"))
PORT = "29400"  # a host's ports are its own
TIMEOUT_S = 120.0


def torchrun(number, address, arguments):
    """The command of host ``number``, where host 0 has ``address``; and its environment."""
    # torchrun knows by itself that a host is the rendezvous' only if the host's name leads to the address
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{PORT}", f"--rdzv-conf=is_host={number == 0}"]
    nodes = ["--nnodes=2", "--nproc-per-node=1", f"--local-addr={address.rpartition('.')[0]}.{number + 1}"]
    return [sys.executable, "-m", "torch.distributed.run", *nodes, *rendezvous, SCRIPT, *arguments], {}


def lightning(number, address, arguments):
    environment = {"MASTER_ADDR": address, "MASTER_PORT": PORT, "NODE_RANK": str(number)}
    return [sys.executable, SCRIPT, *arguments], environment


def run_on_two_hosts(launcher, folder, *arguments):
    """Exit codes and outputs."""
    logs = [folder / f"log-{number}" for number in range(2)]
    with Hosts(2) as hosts:
        processes = []
        for number, host in enumerate(hosts):
            command, environment = launcher(number, hosts[0].address, arguments)
            environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            with logs[number].open("wb") as log:
                processes.append(host.start(command, environment, stdout=log, stderr=log, cwd=folder))
        codes = wait_all(processes, TIMEOUT_S)
    return codes, [log.read_text() for log in logs]


@pytest.mark.parametrize("launcher", [torchrun, lightning])
def test_training_over_two_hosts_equals_one_process(launcher, tmp_path):
    codes, outputs = run_on_two_hosts(launcher, tmp_path, "train", str(tmp_path))
    assert codes == [0, 0], "\n".join(outputs)
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(first, reference(STEPS)[0])


def test_bytes_on_the_wire_are_those_of_ddp():
    ranks = compare(2, 256, 1, ["ddp_adamw", "muon_zero1"], dim=128, rate=None, timeout_s=TIMEOUT_S)
    rows = figures(ranks, 5, 256, {})["rows"]
    for direction in ("sent_parameter_bytes", "received_parameter_bytes"):
        assert 1.0 <= rows["ddp_adamw"][direction] <= 1.03  # in all-reduce's two halves, of two hosts
        assert 1.0 <= rows["muon_zero1"][direction] <= 1.03 * rows["ddp_adamw"][direction]


def test_bytes_on_the_wire_with_sharded_weights():
    """In bytes of the parameters, on two hosts: half a gather for forward and half for backward, half a reduction of
    gradients (a whole one where gloo does it), and half of what a rank holds to owners and back."""
    variants = ["fsdp2_adamw", "muon_fsdp", "muon_fsdp_bf16", "muon_fsdp_torch_reduce"]
    ranks = compare(2, 256, 1, variants, dim=128, rate=None, timeout_s=TIMEOUT_S)
    rows = figures(ranks, 5, 256, {})["rows"]
    for direction in ("sent_parameter_bytes", "received_parameter_bytes"):
        step = {name: row[direction] for name, row in rows.items()}
        update = {name: row["update"][direction] for name, row in rows.items()}
        assert update["fsdp2_adamw"] <= 0.001
        assert 0.5 <= update["muon_fsdp"] <= 0.52
        assert 0.25 <= update["muon_fsdp_bf16"] <= 0.27
        assert 2.0 <= step["fsdp2_adamw"] <= 2.05
        assert 2.0 <= step["muon_fsdp"] <= 2.06
        assert 2.5 <= step["muon_fsdp_torch_reduce"] <= 2.56
    collectives = {name: row["update"]["num_collectives"] for name, row in rows.items()}
    assert collectives["fsdp2_adamw"] == 0
    assert 0 < collectives["muon_fsdp_bf16"] <= collectives["muon_fsdp"]


@pytest.mark.parametrize("killed_rank", [0, 1])
def test_a_killed_rank_ends_the_other_and_leaves_a_whole_checkpoint(killed_rank, tmp_path):
    saved = tmp_path / "checkpoints"
    codes, outputs = run_on_two_hosts(lightning, tmp_path, "die", str(saved), str(killed_rank))
    assert codes[killed_rank] == -9
    assert codes[1 - killed_rank] == 1, outputs[1 - killed_rank]
    # gloo notices the closed connection, and does not wait for the group's timeout
    assert re.search("Connection (closed|reset) by peer|Broken pipe", outputs[1 - killed_rank])
    steps = range(SAVE_EVERY, KILLED_AFTER + 1, SAVE_EVERY)
    assert sorted(path.name for path in saved.iterdir()) == [f"step={step}.ckpt" for step in steps]
    last = saved / f"step={steps[-1]}.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == steps[-1]
    resumed, *_ = fit(STEPS, resume_from=last, strategy="auto")
    assert_close(resumed, reference(STEPS)[0])
