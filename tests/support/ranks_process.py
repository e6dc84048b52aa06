"""The processes of ranks_runner.py: a nursery that has imported torch, and what it forks.

    the nursery      reads runs, a JSON object a line, from standard input; answers each with a line
      a keeper       one for each run: imports the script, prepares, forks its ranks, ends those that hang
        rank 0 ...   calls the CHECKS, in order

PREPARE, if a script has it, names checks and functions without arguments: what would otherwise be done by every rank at
once, such as to compile the same loops with numba. It must leave no thread behind.

Rank R prints to FOLDER/R.log and writes to FOLDER/R.json two lines for each check: its name and null when it begins,
its name and "" or what went wrong when it ends. After a failure the ranks are out of step: it stops there.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# What most scripts import, and takes longest: once for all of them.
COMMON = (
    "headgate.moe",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "transformers.modeling_utils",
)


def module_of(script: Path) -> str:
    return "headgate_test_" + "_".join(script.with_suffix("").parts[-2:])


def load_checks(script: Path) -> dict[str, Callable[[], None]]:
    name = module_of(script)
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CHECKS


def nursery(runs, answers) -> None:
    for module in COMMON:
        with suppress(ImportError):  # the script that wants it will say so
            importlib.import_module(module)
    gc.freeze()  # for all ranks: the collector looks at nothing that was there before them
    for line in runs:
        run, before = json.loads(line), sum(os.times()[2:4])
        os.waitpid(fork(lambda: keep(run), Path(run["folder"]) / "keeper.log"), 0)  # noqa: B023  # called at once
        print(json.dumps({"processor_s": sum(os.times()[2:4]) - before}), file=answers, flush=True)


def fork(work: Callable[[], None], log: Path) -> int:
    """The process number of a child that does `work` and ends; what it prints is in `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(log, "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the parent's is flushed or cleaned up twice


def keep(run: dict) -> None:
    """Forks the ranks of one run and waits for them; after `seconds` each shows where it is, and ends."""
    deadline, folder = time.monotonic() + run["seconds"], Path(run["folder"])
    os.environ.update(run["environment"])
    os.chdir(folder)
    checks: dict = {}
    if run["backend"] == "gloo":  # otherwise each rank loads the script: a device does not survive a fork
        checks = load_checks(Path(run["script"]))
        for name, prepare in getattr(sys.modules[module_of(Path(run["script"]))], "PREPARE", {}).items():
            if name in run["checks"]:
                prepare()
    left = {fork(lambda r=rank: be(r, run, checks), folder / f"{rank}.log") for rank in range(run["size"])}
    for ending in (None, signal.SIGABRT, signal.SIGKILL):
        for pid in left if ending else ():
            os.kill(pid, ending)
        while left and (ending == signal.SIGKILL or time.monotonic() < deadline):
            left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG) != (0, 0)}
            time.sleep(0.02)
        deadline = time.monotonic() + 5


def be(rank: int, run: dict, checks: dict[str, Callable[[], None]]) -> None:
    """One rank, from its process group to its last check."""
    faulthandler.enable()  # SIGABRT prints every thread's stack
    torch.set_num_threads(1)
    backend, size, timeout = run["backend"], run["size"], timedelta(seconds=30)
    if backend != "gloo":
        device = rank if backend == "nccl" else 0
        torch.cuda.set_device(device)
        torch.set_default_device(f"cuda:{device}")
        timeout *= 4  # the first calls compile kernels
        checks = load_checks(Path(run["script"]))
    files = dist.FileStore("store", size)
    dist.init_process_group(backend.removeprefix("cuda:"), store=files, rank=rank, world_size=size, timeout=timeout)
    if backend == "gloo":
        dist.barrier()  # a rank that ends at once would leave another in the middle of connecting
    with open(f"{rank}.json", "w") as lines:
        for name, function in checks.items():
            if name not in run["checks"]:
                continue
            torch.manual_seed(0)
            begun = time.process_time()
            print(json.dumps([name, None]), file=lines, flush=True)
            try:
                function()
                wrong = ""
            except Exception:
                wrong = traceback.format_exc()
            print(json.dumps([name, wrong]), file=lines, flush=True)
            print(f"{time.process_time() - begun:6.2f} s of processor time: {name}", flush=True)
            if wrong:
                return
    dist.destroy_process_group()


if __name__ == "__main__":
    # whatever a library prints must not be taken for an answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with suppress(KeyboardInterrupt):
        nursery(sys.stdin, answers)
