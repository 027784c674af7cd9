"""Runs ``train.py`` in each of the folders that it is told, two at a time, each in a fork of this process.

The fork has imported torch and Lightning, which takes longer than most of the documents' blocks, and nothing of
lightning_muon: a block has to import what it uses. Beside ``train.py`` it leaves ``out``, ``err`` and ``code``.
"""

import atexit
import importlib
import os
import runpy
import sys
import traceback
from pathlib import Path

ARGUMENTS = ["checkpoints"]  # what the script of docs/elastic.md is told


def run(folder: Path) -> None:
    os.chdir(folder)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["train.py", *ARGUMENTS]
    code = 0
    try:
        runpy.run_path("train.py", run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    Path("code").write_text(str(code))
    os._exit(code)


if __name__ == "__main__":
    importlib.import_module("lightning")
    waiting, running = [Path(one).resolve() for one in sys.argv[1:]], 0
    while waiting or running:
        if waiting and running < 2:
            if os.fork() == 0:
                run(waiting[0])
            waiting.pop(0)
            running += 1
        else:
            os.wait()
            running -= 1
