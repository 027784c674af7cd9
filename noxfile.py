"""The supported range, each in an environment of its own: ``pip install nox``, then ``nox -s wheel oldest newest``.

``make test`` runs the suite on the pinned versions of ``constraints.txt``; here are the ends of what ``pyproject.toml``
allows.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["wheel"]

OLDEST = ("torch==2.11.*", "lightning==2.5.*")
SMOKE = Path(__file__).parent / "tests" / "smoke"


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel alone, in an empty environment and outside the repository: it trains, resumes, plans and has types.

    ``nox -s wheel -- FOLDER`` leaves there what was tried, wheel and sdist.
    """
    kept = [Path(one).resolve() for one in session.posargs]
    with tempfile.TemporaryDirectory() as folder:
        session.install("build")
        session.run("python", "-m", "build", "--outdir", folder, ".")
        distributions = list(Path(folder).iterdir())
        (built,) = Path(folder).glob("*.whl")
        session.install(str(built), "mypy")
        session.cd(folder)
        for script in ("train.py", "types_seen.py"):
            (Path(folder) / script).write_text((SMOKE / script).read_text())
        for what in ("muon_zero1", "muon_fsdp", "resume"):
            session.run("python", "train.py", what)
        session.run("lightning-muon", "plan", "--world-size", "2", "--model", "train.Model")
        session.run("mypy", "--strict", "types_seen.py")
        for destination in kept:
            destination.mkdir(parents=True, exist_ok=True)
            for one in distributions:
                shutil.copy(one, destination)


@nox.session
def oldest(session: nox.Session) -> None:
    """The suite on the oldest torch and Lightning."""
    session.install(*OLDEST, ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def newest(session: nox.Session) -> None:
    """The suite on the newest that there are."""
    session.install("--upgrade", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs)
