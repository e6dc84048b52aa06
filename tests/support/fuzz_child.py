"""A process that loads spoiled files, one after the other, under watch; a crash of it is a failure, not the tests' end.

    python fuzz_child.py FOLDER FIRST COUNT LOADER...

Seeds FIRST .. FIRST + COUNT - 1 of each loader. Before each file it writes loader and seed to FOLDER/at, so that who
waits knows what killed it; findings are lines of JSON on standard output, and the numbers of a loader's outcomes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

MOST_s, MOST_MiB, LONGEST = 2.0, 256, 300


def main(folder: Path, first: int, count: int, names: list[str]) -> None:
    warnings.simplefilter("ignore")  # numpy's, on headers of Python 2
    limit = 8 << 30  # of addresses: what takes more gets MemoryError, and is found by its memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in names:
        outcomes = loaded(folder, first, count, name)
        print(json.dumps({"loader": name, "outcomes": outcomes}), flush=True)


def loaded(folder: Path, first: int, count: int, name: str) -> Counter[str]:
    from fuzz_loaders import LOADERS

    loader = LOADERS[name]
    made = folder / name
    made.mkdir()
    # (what is loaded, the file of it that is spoiled)
    good = [(p, p) for p in loader.make(made) if p.is_file()]
    good += [(p, f) for p in made.iterdir() if p.is_dir() for f in sorted(p.iterdir())]
    wanted = {path: loader.load(path) for path, _ in good}
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + max(10, round(count * loader.share))):
        (folder / "at").write_text(f"{name}, seed {seed}")
        path, file = good[seed % len(good)]
        outcome, about = one(loader.load, path, file, seed, wanted[path])
        outcomes[outcome] += 1
        if outcome not in ("same", "refused", "other"):
            print(json.dumps({"loader": name, "seed": seed, "file": file.name, "outcome": outcome, "about": about}))
    return outcomes


def one(load: Any, path: Path, file: Path, seed: int, wanted: object) -> tuple[str, str]:
    from fuzz_spoil import spoil

    whole = file.read_bytes()
    content, summed = spoil(whole, file.name, seed)
    file.write_bytes(content)
    before = resident_MiB("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory counts from here
    start = time.process_time()
    try:
        found = load(path)
    except ValueError as error:
        text = str(error)
        named = file.name in text or path.name in text
        outcome, about = ("refused", "") if named and len(text) <= LONGEST else ("a poor error", text[:600])
    except Exception as error:
        outcome, about = "leaked", f"{type(error).__name__}: {error}"[:600]
    else:
        outcome, about = ("same" if found == wanted else "other"), ""
        if outcome == "other" and summed:
            outcome, about = "silent loss", "bytes of an archive were changed, and nobody said so"
    finally:
        took = time.process_time() - start
        file.write_bytes(whole)
    more = resident_MiB("VmHWM") - before
    if took > MOST_s or more > MOST_MiB:
        return "greedy", f"{outcome}: {took:.1f} s, {more:.0f} MiB"
    return outcome, about


def resident_MiB(what: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status must hold {what}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
