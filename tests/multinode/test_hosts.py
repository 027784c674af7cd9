"""Namespaces as hosts: they are apart, they are counted, and nothing of them stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hosts import Hosts, permitted, wait_all

_PERMITTED, _REASON = permitted()
pytestmark = pytest.mark.skipif(not _PERMITTED, reason=_REASON)

ROOT = Path(__file__).parents[2]
NUM_BYTES = 1_000_000
MAX_OVERHEAD = 1.2  # headers, which weigh more in a young connection's small packets, and repeats
RECEIVE = f"""
import socket
with socket.create_server(("", 5000)) as server:
    connection, _ = server.accept()
    received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert len(received) == {NUM_BYTES}, len(received)
"""
SEND = f"""
import socket, sys, time
for _ in range(100):
    try:
        connection = socket.create_connection((sys.argv[1], 5000))
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
connection.sendall(bytes({NUM_BYTES}))
"""
# a driver that waits inside the context, with a process on a host that has one of its own
DRIVER = """
import sys, time
from benchmarks.hosts import Hosts
with Hosts(3) as hosts:
    hosts[0].start(["sh", "-c", "setsid sleep 1000 & sleep 1000"])
    print(*(host.namespace for host in hosts), flush=True)
    time.sleep(1000)
"""


def namespaces(pid):
    """Those of a process; others on this machine may make some of their own meanwhile."""
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    names = {line.split()[0] for line in done.stdout.splitlines()}
    return {name for name in names if f"-{pid}-" in name}


def running(name):
    """Processes of a namespace; those that have ended are in none."""
    return subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout.split()


def is_running(pid):
    stat = Path("/proc", pid, "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def start_driver():
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return driver, driver.stdout.readline().split()


@pytest.mark.parametrize(("count", "rate"), [(2, None), (2, "1gbit"), (3, "1gbit"), (4, None)])
def test_bytes_between_two_hosts_are_counted_on_both(count, rate):
    with Hosts(count, rate) as hosts:
        receiver = hosts[0].start([sys.executable, "-c", RECEIVE])
        sender = hosts[-1].start([sys.executable, "-c", SEND, hosts[0].address])
        assert wait_all([sender, receiver], 60) == [0, 0]
        sent, received = hosts[-1].wire_bytes()[0], hosts[0].wire_bytes()[1]
        assert NUM_BYTES <= sent <= MAX_OVERHEAD * NUM_BYTES
        assert NUM_BYTES <= received <= MAX_OVERHEAD * NUM_BYTES
        for uninvolved in hosts[1:-1]:
            assert max(uninvolved.wire_bytes()) < 0.01 * NUM_BYTES


def fail_with_hosts(seen):
    with Hosts(4) as hosts:
        seen["process"] = hosts[2].start(["sh", "-c", "setsid sleep 1000 & sleep 1000"])
        while len(pids := running(hosts[2].namespace)) < 3:
            pass
        seen["pids"] = pids
        assert len(namespaces(os.getpid())) == 5  # and a switch
        raise ZeroDivisionError


def test_an_exception_leaves_nothing():
    seen = {}
    with pytest.raises(ZeroDivisionError):
        fail_with_hosts(seen)
    assert not namespaces(os.getpid())
    assert seen["process"].returncode == -9
    assert not any(map(is_running, seen["pids"]))


def test_sigterm_leaves_nothing():
    driver, names = start_driver()
    assert len(namespaces(driver.pid)) == 4
    pids = running(names[0])
    driver.terminate()
    assert driver.wait(60) == 128 + 15
    driver.stdout.close()
    assert not namespaces(driver.pid)
    assert not any(map(is_running, pids))


def test_the_next_run_removes_what_a_killed_one_left():
    driver, names = start_driver()
    pids = running(names[0])
    driver.kill()
    driver.wait(60)
    driver.stdout.close()
    with Hosts(2):
        assert not namespaces(driver.pid)
    assert not namespaces(os.getpid())
    assert not any(map(is_running, pids))


def test_two_runs_at_the_same_time():
    with Hosts(2) as one, Hosts(2) as other:
        assert one[0].address == other[0].address
        receivers = [hosts[0].start([sys.executable, "-c", RECEIVE]) for hosts in (one, other)]
        senders = [hosts[1].start([sys.executable, "-c", SEND, hosts[0].address]) for hosts in (one, other)]
        assert wait_all([*senders, *receivers], 60) == [0, 0, 0, 0]


@pytest.mark.parametrize("count", [1, 5])
def test_number_of_hosts_is_checked(count):
    with pytest.raises(ValueError, match="choose 2, 3 or 4"):
        Hosts(count)
