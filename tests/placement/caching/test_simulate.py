"""The simulator against plain Python, Belady against every other way to choose, and policies on planted structure."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from cache_model import Model, rules
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.placement.caching.cache import Cache
from headgate.placement.caching.cache import __file__ as cache_file
from headgate.placement.caching.policies import POLICIES, Setting, policy
from headgate.placement.caching.pools import per_layer, pools, shared
from headgate.placement.caching.simulate import Prefetch, foreseen, least_loads, perfect, simulate, slots_of
from headgate.placement.caching.steps import steps_of
from headgate.placement.traces.file import TraceFile
from headgate.placement.traces.generate import generate
from headgate.placement.traces.trace import Trace


def random_trace(seed, layers, experts, top_k, tokens, dropped=0.1):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((layers, tokens, experts)) ** np.arange(1, experts + 1), axis=2)[:, :, :top_k]
    ids = np.where(rng.random(ids.shape) < dropped, 255, ids).astype(np.uint8)
    sequence = np.sort(rng.integers(0, 3, tokens)).astype(np.int32)
    return Trace(ids, experts, sequence=sequence)


def steps_in_python(trace, batch):
    """[(layer, distinct experts, a sequence begins, tokens)]"""
    tokens, found = range(trace.shape[1]), []
    for _, run in itertools.groupby(tokens, lambda t: trace.sequence[t]):
        run = list(run)
        for n, group in enumerate(run[i : i + batch] for i in range(0, len(run), batch)):
            for layer in range(trace.shape[0]):
                ids = {int(e) for t in group for e in trace.expert_ids[layer, t] if e != trace.none}
                found.append((layer, sorted(ids), n == 0 and layer == 0, len(group)))
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    layers=st.integers(1, 3),
    experts=st.integers(2, 6),
    batch=st.integers(1, 4),
    name=st.sampled_from(["lru", "lfu-cached", "lfru", "ring"]),
    scope=st.sampled_from(["layer", "shared"]),
    horizons=st.lists(st.integers(1, 4), max_size=2),
)
def test_the_log_is_what_plain_python_does(seed, layers, experts, batch, name, scope, horizons):
    rng = np.random.default_rng(seed)
    trace = random_trace(seed, layers, experts, 2, int(rng.integers(0, 14)))
    expected = steps_in_python(trace, batch)
    steps = steps_of(trace, batch)
    assert [(int(l), steps.of(n).tolist(), bool(steps.begins[n]), int(steps.tokens[n]))
            for n, l in enumerate(steps.layer)] == expected  # fmt: skip
    ahead = [
        Prefetch(np.sort(rng.integers(-1, experts, (len(expected), 3)))[:, ::-1], None, h, int(rng.integers(0, 3)))
        for h in horizons
    ]
    slots = int(rng.integers(1, experts + 1))
    found = simulate(trace, name, slots, scope=scope, batch=batch, prefetch=ahead, log=True)
    places = per_layer(layers, experts, slots) if scope == "layer" else shared(layers, experts, layers * slots)
    saw, value, left, begins = rules(name, layers, experts)
    model = Model(places.of.tolist(), np.diff(places.first).tolist(), saw, value, left)
    log, hits, used, waiting = [], np.zeros(layers, int), np.zeros(layers, int), set()

    def displaced(gone):
        waiting.discard((gone // experts, gone % experts))

    for n, (layer, ids, first, _) in enumerate(expected):
        if first:
            begins()
        served, count = model.step(layer, ids)
        hits[layer] += count
        for e, _, gone, wave in served:
            used[layer] += gone == -2 and (layer, e) in waiting
            waiting.discard((layer, e))
            displaced(gone)
            log.append((n, layer * experts + e, gone, wave, False))
        for one in ahead:
            if n + one.horizon < len(expected):
                to = expected[n + one.horizon][0]
                wanted = list(itertools.takewhile(lambda e: e >= 0, one.ids[n + one.horizon].tolist()))
                for e, _, gone in model.prefetch(to, wanted, [np.inf] * len(wanted), one.most):
                    displaced(gone)
                    waiting.add((to, e))
                    log.append((n, to * experts + e, gone, 0, True))
    assert list(zip(*(field.tolist() for field in found.log), strict=True)) == log
    assert found.hits.tolist() == hits.tolist()
    assert found.used.tolist() == used.tolist()
    assert found.accesses.sum() == sum(len(ids) for _, ids, _, _ in expected)
    assert found.prefetched.sum() == sum(event[4] for event in log)
    assert found.transfers == sum(event[2] != -2 for event in log)


def fewest_loads(steps, places):
    """The fewest misses of any order in which a step's misses are served, and any choice of victims, what the step has
    just used included: by trying all of them."""
    states = {frozenset(): 0}  # who is there: misses so far
    size = np.diff(places.first).tolist()
    for n, layer in enumerate(steps.layer.tolist()):
        ids = [(layer, e) for e in steps.of(n).tolist()]
        after: dict = {}
        for there, misses in states.items():
            missing = frozenset(key for key in ids if key not in there)
            now = {(there, missing)}  # who is there, who is still to come
            for _ in missing:
                more = set()
                for held, left in now:
                    for key in left:
                        mine = [x for x in held if places.of[x] == places.of[key]]
                        gone = [{x} for x in mine] if len(mine) == size[places.of[key]] else [set()]
                        more |= {(held - g | {key}, left - {key}) for g in gone}
                now = more
            for held, _ in now:
                after[held] = min(after.get(held, 1 << 30), misses + len(missing))
        states = after
    return min(states.values())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    layers=st.integers(1, 2),
    experts=st.integers(2, 5),
    batch=st.integers(1, 3),
    scope=st.sampled_from(["layer", "shared", "pools"]),
)
def test_nothing_beats_belady(seed, layers, experts, batch, scope):
    rng = np.random.default_rng(seed)
    trace = random_trace(seed, layers, experts, min(2, experts), int(rng.integers(1, 8)))
    if scope == "pools":
        count = int(rng.integers(1, 3))
        places = pools(rng.integers(0, count, (layers, experts)), rng.integers(1, 4, count))
    else:
        places = slots_of(int(rng.integers(1, experts + 1)), layers, experts, scope)
    steps = steps_of(trace, batch)
    least, fewest = least_loads(steps, places), fewest_loads(steps, places)
    assert least.sum() <= fewest <= simulate(steps, "belady", places).loads
    for name in POLICIES:
        found = simulate(steps, name, places, fit=trace, log=True)
        loads = np.bincount(found.log.step[found.log.gone != -2], minlength=len(steps))
        assert (least.cumsum() <= loads.cumsum()).all()
        assert found.loads >= fewest


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), experts=st.integers(2, 5), slots=st.integers(1, 5), batch=st.integers(1, 3))
def test_the_least_is_the_least_where_a_miss_may_pass_by(seed, experts, slots, batch):
    """Against every choice of who is kept of those who were there and those who came, one layer."""
    steps = steps_of(random_trace(seed, 1, experts, min(2, experts), 8), batch)
    states = {frozenset(): 0}
    for n in range(len(steps)):
        ids, after = set(steps.of(n).tolist()), {}
        for there, misses in states.items():
            for kept in combinations(sorted(there | ids), min(slots, len(there | ids))):
                key = frozenset(kept)
                after[key] = min(after.get(key, 1 << 30), misses + len(ids - there))
        states = after
    assert least_loads(steps, slots_of(min(slots, experts), 1, experts)).sum() == min(states.values())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), horizon=st.integers(1, 3), slots=st.integers(1, 5), most=st.integers(0, 3))
def test_fetching_ahead_never_takes_fewer_copies_than_the_least(seed, horizon, slots, most):
    trace = random_trace(seed, 2, 5, 2, 20)
    steps = steps_of(trace)
    for rule in ("lru", "belady"):
        found = simulate(steps, rule, slots, prefetch=perfect(steps, horizon, most))
        assert found.transfers >= least_loads(steps, slots_of(slots, 2, 5)).sum()
        assert (found.used <= found.prefetched).all()


def test_a_foreseen_step_costs_no_misses():
    """With the next step's experts known and slots for two steps, only the very first step misses."""
    steps = steps_of(random_trace(1, 1, 6, 2, 40, dropped=0.0))
    found = simulate(steps, "lru", 4, prefetch=perfect(steps))
    assert found.loads == 2
    assert (found.used == found.prefetched).all()


@pytest.mark.parametrize("name", [*POLICIES, "belady"])
@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_the_live_cache_takes_the_simulators_decisions(name, scope):
    trace = generate(layers=3, experts=8, top_k=2, tokens=200, length=25, seed=2)
    found = simulate(trace, name, 4, scope=scope, batch=2, fit=trace, log=True)
    if name == "belady":
        assert found.hit_rate > simulate(trace, "lru", 4, scope=scope, batch=2).hit_rate
        return
    cache = Cache(slots_of(4, 3, 8, scope), policy(name, Setting(3, 8, 12, trace)))
    log, steps = [], found.steps
    for n, layer in enumerate(steps.layer.tolist()):
        if steps.begins[n]:
            cache.new_sequence()
        step = cache.step(layer, steps.of(n))
        log += [(n, layer * 8 + e, gone) for e, gone in zip(step.experts.tolist(), step.gone.tolist(), strict=True)]
    assert list(zip(found.log.step.tolist(), found.log.expert.tolist(), found.log.gone.tolist(), strict=True)) == log


def hits(rule, trace, slots, fit=None, scope="layer", **options):
    return simulate(trace, rule, slots, fit=fit, scope=scope, options=options).hit_rate


def test_each_policy_finds_what_it_is_made_for():
    rng = np.random.default_rng(0)
    popular = np.minimum(rng.geometric(0.3, (1, 600, 1)) - 1, 9).astype(np.uint8)
    hot = Trace(popular, 10)
    for name in ("lfu", "static", "statistics", "affinity"):
        assert hits(name, hot, 4, hot) > hits("random", hot, 4) + 0.05
    moved = Trace(np.concatenate([popular, 9 - popular], axis=1), 10)
    assert hits("lfu", moved, 4, decay=0.98) > hits("lfu", moved, 4) + 0.05
    # two kinds of sequences with experts of their own: the library tells after one token what the rest will use
    kind = np.repeat(rng.integers(0, 2, 80), 12)
    ids = (4 * kind + rng.integers(0, 4, 960))[None, :, None].astype(np.uint8)
    kinds = Trace(ids, 8, sequence=np.repeat(np.arange(80, dtype=np.int32), 12))
    half = kinds.select(slice(480)), kinds.select(slice(480, None))
    assert hits("sequence", half[1], 4, half[0]) > hits("static", half[1], 4, half[0]) + 0.15
    # the second layer repeats its experts, the first never does: a shared pool belongs to the second
    cycle, few = np.arange(900) % 30, rng.integers(0, 6, 900)
    layers = Trace(np.stack([cycle, few])[:, :, None].astype(np.uint8), 30)
    assert hits("layer", layers, 4, scope="shared") > hits("lru", layers, 4, scope="shared") + 0.05
    # every layer goes round: the ring keeps what comes next, where the least recently used is what comes next
    loop = Trace(np.zeros((10, 200, 1), np.uint8), 1)
    assert hits("ring", loop, pools(np.zeros((10, 1), int), np.array([7]))) > 0.6
    assert hits("lru", loop, pools(np.zeros((10, 1), int), np.array([7]))) == 0.0


def test_chances_become_candidates():
    """Two layers, three tokens in passes of two: an expert's chance in a pass is one less that nobody uses it."""
    trace = Trace(np.zeros((2, 3, 1), np.uint8), 3)
    chances = np.array([[[0.1, 0.5, 0.2], [0.6, 0.5, 0.0], [0.2, 0.1, 0.3]], [[0.0, 0.0, 1.0]] * 3])
    found = foreseen(steps_of(trace, 2), chances, 2, horizon=2, most=1)
    assert found.ids.tolist() == [[1, 0], [2, 0], [2, 0], [2, 0]]
    assert found.worth == pytest.approx(np.array([[0.75, 0.64], [1, 0], [0.3, 0.2], [1, 0]]))
    assert (found.horizon, found.most) == (2, 1)


def test_what_a_worth_is_for():
    """Fetched where worth more than the value of the one that must go, which is static: its share of the tokens."""
    trace = Trace(np.array([[[0], [1], [0], [2], [0], [1], [0], [3]]], np.uint8), 4)
    steps = steps_of(trace)
    for worth, fetched in ((0.1, 1), (0.2, 2), (0.9, 6)):  # into a free slot; over expert 2, too; over all
        wanted = Prefetch(np.full((8, 1), 3), np.full((8, 1), worth))
        assert simulate(steps, "static", 2, fit=trace, prefetch=wanted).prefetched.sum() == fetched


def test_a_trace_file_gives_the_same(tmp_path):
    trace = generate(layers=2, experts=8, top_k=2, tokens=100, length=30)
    trace.save(tmp_path / "t.npz")
    with TraceFile(tmp_path / "t.npz") as file:
        assert simulate(file, "lru", 0.5).hits.tolist() == simulate(trace, "lru", 4).hits.tolist()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"slots": 0}, "slots must be 1 .. 8 a layer, got 0"),
        ({"slots": 9}, "slots must be 1 .. 8 a layer, got 9"),
        ({"slots": 1.5}, "slots must be a share above 0 and at most 1, or a whole number, got 1.5"),
        ({"scope": "global"}, "scope must be one of layer, shared, got 'global'"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"rule": "static"}, "static must be given a trace to learn from"),
        ({"prefetch": Prefetch(np.zeros((3, 1), int))}, r"ids of prefetch must be \[N=40, m\], got \(3, 1\)"),
        ({"prefetch": Prefetch(np.full((40, 1), 8))}, r"ids of prefetch must be -1 .. 7, got \(8, 8\)"),
        ({"prefetch": Prefetch(np.zeros((40, 1), int), None, 0)}, "horizon must be at least 1"),
        ({"prefetch": Prefetch(np.zeros((40, 1), int), np.zeros(40))}, r"worth must be \(40, 1\) as ids, got \(40,\)"),
    ],
)
def test_bad_input_is_refused(more, says):
    trace = generate(layers=2, experts=8, top_k=2, tokens=20)
    with pytest.raises(ValueError, match=says):
        simulate(trace, **{"slots": 4} | more)


def test_chances_that_do_not_fit_are_refused():
    steps = steps_of(generate(layers=2, experts=8, top_k=2, tokens=20))
    with pytest.raises(ValueError, match=r"chances must be \[L, T, E\] = \(2, 20, 8\), got \(2, 19, 8\)"):
        foreseen(steps, np.zeros((2, 19, 8)), 2)
    with pytest.raises(ValueError, match=r"candidates must be 1 \.\. 8, got 9"):
        foreseen(steps, np.zeros((2, 20, 8)), 9)


def prints(code: str, folder: Path) -> str:
    """What a new process prints, to which `folder` holds the package."""
    code = f"import sys\nsys.path.insert(0, {str(folder)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def change(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert text.count(before) == 1
    file.write_text(text.replace(before, after))


def test_a_changed_file_is_not_run_as_it_was_compiled_before(tmp_path):
    """numba looks at a function's own file alone, and what `high` calls stands in another."""
    room = tmp_path / "headgate" / "placement" / "caching"
    room.mkdir(parents=True)
    shutil.copy(Path(cache_file).parents[1] / "compiled.py", room.parent)
    for folder in (room, room.parent, room.parent.parent):
        (folder / "__init__.py").touch()
    own = "from ..compiled import njit\n\n@njit\ndef "
    (room / "low.py").write_text(f"{own}low(x):\n    return x + 1\n")
    (room / "high.py").write_text(f"from .low import low\n{own}high(x):\n    return low(x)\n")
    code = "from headgate.placement.caching.high import high\nprint(high(1), sum(high.stats.cache_hits.values()))"
    assert [prints(code, tmp_path) for _ in range(2)] == ["2 0", "2 1"]
    change(room / "low.py", "x + 1", "x + 41")
    assert prints(code, tmp_path) == "42 0"


ADVANCE = """
import numpy as np
from headgate.placement.caching.policies import Setting, policy
from headgate.placement.caching.policies.step import advance
state = policy("lru", Setting(1, 2, 1))
advance(state, 0, np.array([1], np.int32), 7)
print(state.value.tolist(), sum(advance.stats.cache_hits.values()))
"""


@pytest.mark.slow  # compiles every policy, twice
def test_a_changed_policy_is_not_run_as_it_was_compiled_before(tmp_path):
    """`advance` stands in another file than the policies."""
    here = Path(cache_file).parents[2]
    package = tmp_path / "headgate"
    shutil.copytree(here / "placement", package / "placement", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(here / "__init__.py", package / "__init__.py")
    assert [prints(ADVANCE, tmp_path) for _ in range(2)] == ["[[0.0, 7.0]] 0", "[[0.0, 7.0]] 1"]
    recency = package / "placement" / "caching" / "policies" / "recency.py"
    change(recency, "value[layer, e] = now\n", "value[layer, e] = -now\n")
    assert prints(ADVANCE, tmp_path) == "[[0.0, -7.0]] 0"
