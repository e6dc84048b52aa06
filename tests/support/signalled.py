"""A `headgate` process that gets a signal: when, and what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HEADGATE = str(Path(sys.executable).with_name("headgate"))
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass(frozen=True)
class Ended:
    """`status` as subprocess has it; `said`: standard error; `left`: names in the folder of temporaries; `children`:
    processes of its session that outlive it by two seconds."""

    status: int
    said: str
    out: str
    left: list[str]
    children: list[str]


class Process:
    """`headgate ARGV`, started in `folder` as a shell starts it in the foreground, with temporaries in a folder of its
    own and one thread."""

    def __init__(self, argv: Sequence[str], folder: Path) -> None:
        self.temporary = folder / "temporaries"
        self.temporary.mkdir(exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / ".inductor")}  # torch makes it when it is imported
        self.files = [(folder / name).open("w+") for name in (".out", ".err")]
        self.process = subprocess.Popen(
            [HEADGATE, *argv], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=self.files[0],
            stderr=self.files[1], start_new_session=True, preexec_fn=_foreground,
        )  # fmt: skip

    def wait_until(self, so_far: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None and not so_far():
            time.sleep(0.0005)

    def listens(self) -> bool:
        """Whether its handlers are there: Python by itself catches no SIGTERM."""
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        except OSError:
            return True
        caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    def output(self) -> str:
        return Path(self.files[0].name).read_text() + Path(self.files[1].name).read_text()

    def ended(self, seconds: float = 60.0) -> Ended:
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        end = time.monotonic() + 2
        while (children := _session(self.process.pid)) and time.monotonic() < end:
            time.sleep(0.02)
        if children:
            os.killpg(self.process.pid, signal.SIGKILL)
        said = []
        for file in self.files:
            file.seek(0)
            said.append(file.read())
            file.close()
        left = sorted(str(p.relative_to(self.temporary)) for p in self.temporary.rglob("*"))
        return Ended(status, said[1], said[0], left, children)


def _foreground() -> None:
    """A shell without job control starts background jobs, such as a whole test run, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _session(leader: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(")", 1)
        except OSError:
            continue
        fields = rest.split()
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(name)
    return found
