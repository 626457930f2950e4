"""Commands in processes of their own: run to the end, or killed by a clock that knows nothing of what they do."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .command import ROOT

LAUNCH = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def begun(arguments: list[str], **more: str) -> subprocess.Popen[bytes]:
    """Python, started with these arguments, unheard."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment(**more), **quiet)


def finished(arguments: list[str], out: Path, **more: str) -> dict[str, Any]:
    """The report that Python, called with these arguments, must leave in the checkpoint that it names, once."""
    command = [sys.executable, *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{out}\n", "more than one process printed"
    found: dict[str, Any] = json.loads((out / "fxprune_report.json").read_text())
    return found


def kill_again_and_again(arguments: list[str], out: Path, states: Callable[[], set[Path]], times: int, longest: float) -> None:
    """Start the command so many times, and kill it with signal 9 up to ``longest`` seconds after it wrote a new state."""
    chosen, kills = random.Random(0), 0
    while kills < times and not out.exists():
        before = states()
        process = begun(arguments)
        while process.poll() is None and states() <= before:
            time.sleep(0.005)
        time.sleep(chosen.uniform(0, longest))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += not out.exists()
    assert kills >= 3, "it was over before it was killed: no test"
