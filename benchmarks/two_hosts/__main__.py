"""Two and four hosts with a slow link: bytes on the wire and time of a training step, against DDP and against others.

``python -m benchmarks.two_hosts [--sharded] [--json benchmarks/results/two_hosts.json]``, as root on Linux.

The hosts are network namespaces (``benchmarks.hosts``) with one process and one thread each. Every variant has its own
model of 18 matrices and 9.4 M parameters and takes turns with the others, in blocks of several steps that end when all
weights have been read. Bytes are those of the hosts' network devices over a whole block, headers included. Where
weights are sharded (``--sharded``), the optimizer's steps are measured by themselves, too, and their collectives
counted as torch dispatches them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.hosts import Hosts, wait_all
from benchmarks.two_hosts.fsdp import SHARDED
from benchmarks.two_hosts.peers import PEERS, missing, version
from benchmarks.two_hosts.rank import Job
from benchmarks.two_hosts.report import figures, print_run
from benchmarks.two_hosts.variants import VARIANTS
from examples.moe_lm.environment import environment

_TIMEOUT_S = 7200.0
_ROOT = Path(__file__).parents[2]


def run(
    hosts: int,
    tokens: int,
    rounds: int,
    variants: list[str],
    *,
    steps: int = 5,
    dim: int = 512,
    rate: str | None = "1gbit",
    iteration: str = "float32",
    timeout_s: float = _TIMEOUT_S,
) -> list[dict[str, Any]]:
    """Compare the variants on so many hosts; arguments as in ``Job``, ``rate`` as in ``Hosts``.

    Returns:
        What each rank has measured.

    Raises:
        RuntimeError: A rank failed.
    """
    with tempfile.TemporaryDirectory() as folder, Hosts(hosts, rate) as nodes:
        jobs = [Job(rank, hosts, folder, variants, rounds, steps, tokens, dim, iteration) for rank in range(hosts)]
        processes = []
        for job, host in zip(jobs, nodes, strict=True):
            command = [sys.executable, "-m", "benchmarks.two_hosts.rank", job.argument()]
            environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
            with open(f"{folder}/log{job.rank}", "wb") as log:
                processes.append(host.start(command, environment, stdout=log, stderr=log))
        codes = wait_all(processes, timeout_s)
        for rank, code in enumerate(codes):
            if code != 0:
                log_tail = Path(f"{folder}/log{rank}").read_text(errors="replace")[-4000:]
                raise RuntimeError(f"Rank {rank} ended with {code}:\n{log_tail}")
        return [json.loads(job.figures().read_text()) for job in jobs]


def _parse_run(text: str) -> tuple[int, int, int]:
    hosts, tokens, rounds = map(int, text.split(":"))
    return hosts, tokens, rounds


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*VARIANTS, *SHARDED, *PEERS]
    sharded = [*SHARDED, *(name for name in PEERS if name.startswith("fsdp2_"))]
    parser.add_argument(
        "--runs",
        nargs="+",
        type=_parse_run,
        default=[(2, 256, 10), (4, 256, 6), (2, 8192, 4)],
        metavar="HOSTS:TOKENS:ROUNDS",
        help="hosts, tokens per rank and step, rounds of one block of each variant; default 2:256:10 4:256:6 2:8192:4",
    )
    parser.add_argument("--steps", type=int, default=5, help="steps of a block")
    parser.add_argument("--rate", default="1gbit", help="of every link, in each direction, as tc writes it")
    parser.add_argument("--sharded", action="store_true", help="the variants on FSDP2, in place of the others")
    parser.add_argument("--variants", nargs="+", choices=names, default=None, help="a choice of one's own")
    parser.add_argument(
        "--iteration",
        choices=("float32", "bfloat16", "own"),
        default="float32",
        help="who lets one choose orthogonalises as lightning_muon does, in this dtype; 'own': as its authors do",
    )
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    replicated = [name for name in [*VARIANTS, *PEERS] if name != "fsdp2_dion"]
    options.variants = options.variants or (sharded if options.sharded else replicated)
    absent = {name: reason for name in options.variants if (reason := missing(name))}
    present = [name for name in options.variants if name not in absent]
    settings = {
        "rate": options.rate,
        "iteration": options.iteration,
        "steps_per_block": options.steps,
        "peer_versions": {PEERS[name][0]: version(name) for name in present if name in PEERS},
    }
    results = []
    for hosts, tokens, rounds in options.runs:
        ranks = run(hosts, tokens, rounds, present, steps=options.steps, rate=options.rate, iteration=options.iteration)
        which = {"hosts": hosts, "tokens_per_rank": tokens, "rounds": rounds}
        results.append({**which, **figures(ranks, options.steps, tokens, absent)})
        print_run(results[-1])
        if options.json is not None:  # after each run: the next takes a while
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps({**settings, "runs": results, **environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
