"""Hosts on one machine: network namespaces, each with its own address, joined by a link that can be slowed down.

Two hosts are the two ends of a cable (a veth pair); three or four hang on a switch (a bridge in a namespace of its
own). Addresses, ports and devices of a namespace are its own, so that runs at the same time cannot collide: only the
namespaces' names must differ. Linux, root, ``ip`` and (for a rate) ``tc`` from iproute2 are needed.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Host", "Hosts", "permitted", "wait_all", "wire_bytes"]

_DEVICE = "eth0"  # of every host; a namespace has devices of its own
_SWITCH = "br0"
_PREFIX = "lmhost"
_run_numbers = itertools.count()


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        namespace: The name of its network namespace.
        address: Its IPv4 address.
        device: Its network device.
    """

    namespace: str
    address: str
    device: str = _DEVICE
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False, compare=False)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a command on this host; gloo there talks through the host's device.

        Args:
            command: The program and its arguments.
            environment: Variables to set, beside those of this process.
            options: Those of ``subprocess.Popen``: ``stdout``, ``cwd``, ….
        """
        variables = {**os.environ, "GLOO_SOCKET_IFNAME": self.device, **(environment or {})}
        command = ["ip", "netns", "exec", self.namespace, *command]
        self._started.append(subprocess.Popen(command, env=variables, **options))
        return self._started[-1]

    def kill_all(self) -> None:
        """Kill every process on this host, also those that its processes have started."""
        for process in self._started:
            process.kill()
        _kill_processes(self.namespace)
        while self._started:
            self._started.pop().wait()

    def wire_bytes(self) -> tuple[int, int]:
        """See ``wire_bytes``, asked from outside."""
        folder = f"/sys/class/net/{self.device}/statistics"
        counters = [f"{folder}/tx_bytes", f"{folder}/rx_bytes"]
        sent, received = _call("ip", "netns", "exec", self.namespace, "cat", *counters).split()
        return int(sent), int(received)


def wire_bytes() -> tuple[int, int]:
    """Bytes ``(sent, received)`` by gloo's device since it exists, headers and repeats included; called on the host."""
    folder = Path("/sys/class/net") / os.environ["GLOO_SOCKET_IFNAME"] / "statistics"
    return int((folder / "tx_bytes").read_text()), int((folder / "rx_bytes").read_text())


class Hosts:
    """A context that makes hosts and removes them, with every process on them, whatever happens inside.

    Also on SIGTERM, which becomes ``SystemExit`` while the context is open. What a run that was killed outright has
    left is removed by the next one.

    Args:
        count: How many hosts, 2 to 4.
        rate: What every link carries in each direction, as ``tc`` writes it (``"1gbit"``); ``None`` does not limit.

    Raises:
        ValueError: ``count`` is out of range.
        RuntimeError: ``ip`` or ``tc`` fails; see ``permitted``.
    """

    def __init__(self, count: int = 2, rate: str | None = None) -> None:
        if not 2 <= count <= 4:
            raise ValueError(f"Hosts(count={count}): choose 2, 3 or 4 hosts.")
        self._rate = rate
        run = f"{_PREFIX}-{os.getpid()}-{next(_run_numbers)}"
        self._switch = [f"{run}-switch"] if count > 2 else []
        self.hosts = [Host(f"{run}-{number}", f"10.77.0.{number + 1}") for number in range(count)]
        self._handler: Any = None

    def __enter__(self) -> list[Host]:
        if _in_main_thread():
            self._handler = signal.signal(signal.SIGTERM, _raise_system_exit)
        try:
            _remove_what_the_dead_left()
            self._build()
        except BaseException:
            self._remove()
            raise
        return self.hosts

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def _build(self) -> None:
        names = [host.namespace for host in self.hosts]
        for name in [*names, *self._switch]:
            _call("ip", "netns", "add", name)
        if self._switch:
            (switch,) = self._switch
            _call("ip", "-n", switch, "link", "add", _SWITCH, "type", "bridge")
            _call("ip", "-n", switch, "link", "set", _SWITCH, "up")
            ends = [(switch, f"port{number}") for number in range(len(names))]
            for name, end in zip(names, ends, strict=True):
                _connect((name, _DEVICE), end, self._rate)
                _call("ip", "-n", switch, "link", "set", end[1], "master", _SWITCH)
        else:
            _connect((names[0], _DEVICE), (names[1], _DEVICE), self._rate)
        for host in self.hosts:
            _call("ip", "-n", host.namespace, "link", "set", "lo", "up")
            _call("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.device)

    def _remove(self) -> None:
        try:
            with _uninterrupted():
                for host in self.hosts:
                    host.kill_all()
                _remove_namespaces(*self._switch, *(host.namespace for host in self.hosts))
        finally:
            if _in_main_thread():
                signal.signal(signal.SIGTERM, self._handler or signal.SIG_DFL)


def permitted() -> tuple[bool, str]:
    """Whether hosts can be made here, and if not, why; found out by making two."""
    if not sys.platform.startswith("linux"):
        return False, f"network namespaces need Linux, this is {sys.platform}"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return False, f"{' and '.join(missing)} of iproute2 not found"
    if os.geteuid() != 0:
        return False, "network namespaces need root"
    try:
        with Hosts(2, rate="1gbit"):
            return True, ""
    except RuntimeError as error:
        return False, f"network namespaces are not permitted: {error}"


def wait_all(processes: Iterable[subprocess.Popen[bytes]], timeout_s: float) -> list[int]:
    """Exit codes of all processes.

    Raises:
        subprocess.TimeoutExpired: One still runs after ``timeout_s`` seconds, counted from the call.
    """
    end = time.monotonic() + timeout_s
    return [process.wait(max(0.0, end - time.monotonic())) for process in processes]


def _connect(one: tuple[str, str], other: tuple[str, str], rate: str | None) -> None:
    """Join two ``(namespace, device)`` by a cable of so many bits per second in each direction."""
    pair = ["netns", one[0], "type", "veth", "peer", "name", other[1], "netns", other[0]]
    _call("ip", "link", "add", one[1], *pair)
    for namespace, device in (one, other):
        _call("ip", "-n", namespace, "link", "set", device, "up")
        if rate is not None:
            bucket = ["rate", rate, "burst", "256kb", "latency", "50ms"]
            _call("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *bucket)


def _kill_processes(namespace: str) -> None:
    while namespace in _namespaces() and (pids := _call("ip", "netns", "pids", namespace).split()):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)


def _remove_namespaces(*names: str) -> None:
    """Remove these namespaces, as far as they exist, with their processes; their devices go with them."""
    for name in names:
        _kill_processes(name)
        if name in _namespaces():
            _call("ip", "netns", "delete", name)


def _remove_what_the_dead_left() -> None:
    for name in _namespaces():
        prefix, _, rest = name.partition("-")
        if prefix == _PREFIX and not Path("/proc", rest.partition("-")[0]).exists():
            _remove_namespaces(name)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _call("ip", "netns", "list").splitlines()]


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off SIGTERM and SIGINT until the end; other threads than the main one do not get them anyway."""
    if not _in_main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for put_off in came:
            signal.raise_signal(put_off)


def _raise_system_exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
