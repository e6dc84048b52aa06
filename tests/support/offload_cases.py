"""Small layers of experts for offload tests, and a store that can be slow, fail, or kill who reads."""

from __future__ import annotations

import threading
import time
from collections import Counter

import torch
from torch import nn

import headgate
from headgate.kernels import quantize
from headgate.kernels.grouped_ffn import grouped_ffn
from headgate.kernels.routing import Routing
from headgate.moe.offload import Engine, FileStore, HostStore, Layer

L, E, D, F, K = 3, 8, 24, 16, 2


def weights(dtype=torch.float32, *, layers=L, experts=E, d=D, f=F, form=None, bias=False) -> list[dict]:
    """Random weights of each layer, in a form that grouped_ffn takes: None, "plain", "transposed" or "pair"."""
    made = []
    for _ in range(layers):
        width = f if form in ("plain", "pair") else 2 * f
        w = {"w_gate_up": torch.randn(experts, width, d), "w_down": torch.randn(experts, d, f)}
        if form == "transposed":
            w = {name: t.transpose(1, 2).contiguous() for name, t in w.items()}
        if form == "pair":
            w = {"w_gate": w.pop("w_gate_up"), "w_up": torch.randn(experts, f, d), **w}
        if bias:
            w |= {"b_gate_up": torch.randn(experts, width), "b_down": torch.randn(experts, d)}
        made.append({name: t.to(dtype) for name, t in w.items()})
    return made


def layers_of(made: list[dict]) -> list[Layer]:
    return [Layer.of(f"model.{i}.experts", (range(len(w["w_down"])), w)) for i, w in enumerate(made)]


def mixed() -> tuple[list[Layer], list[list[dict]]]:
    """Two layers and their weights: bf16 with biases; experts 1 and 4 in mxfp4 and the others in fp32."""
    first = {"w_gate_up": torch.randn(3, 8, 6).bfloat16(), "b_down": torch.randn(3, 6)}
    few = {"w_down": quantize(torch.randn(2, 5, 64), "mxfp4"), "w_gate_up": torch.randn(2, 3, 7)}
    many = {"w_down": torch.randn(3, 5, 64), "w_gate_up": torch.randn(3, 3, 7)}
    layers = [Layer.of("a.b", (range(3), first)), Layer.of("c", ((1, 4), few), ((0, 2, 3), many))]
    return layers, [[first], [few, many]]


def host_store(made: list[dict]) -> HostStore:
    return HostStore(layers_of(made), lambda i: [made[i]])


def file_store(made: list[dict], path, **options) -> FileStore:
    return FileStore.write(path, layers_of(made), lambda i: [made[i]], **options)


def batch(tokens: int, dtype=torch.float32, *, experts=E, k=K, d=D, generator=None) -> tuple[torch.Tensor, Routing]:
    """Random rows, and a routing of distinct experts."""
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k]
    x = torch.randn(tokens, d, generator=generator).to(dtype)
    return x, Routing.from_topk(ids, torch.rand(tokens, k, generator=generator).to(dtype), experts)


def resident(x, routing, w: dict, **form) -> torch.Tensor:
    """The same with every weight at hand."""
    first = (w["w_gate"], w["w_up"]) if "w_gate" in w else w["w_gate_up"]
    biases = {name: w[name] for name in ("b_gate_up", "b_down") if name in w}
    return grouped_ffn(x, routing, first, w["w_down"], **biases, **form)


class Stack(nn.Module):
    """Three MoE layers in a residual stream."""

    def __init__(self, dtype=torch.float32, **options):
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 16, "num_experts": 8, "top_k": 2, **options}
        self.blocks = nn.ModuleList(headgate.MoE(**sizes, dtype=dtype) for _ in range(3))

    def forward(self, input_ids=None, x=None):
        if x is None:
            table = torch.randn(64, 32, generator=torch.Generator().manual_seed(5))
            x = table[input_ids].to(self.blocks[0].experts.w_down.dtype)
        for block in self.blocks:
            x = x + block(x)
        return x


class Watched:
    """A store that counts its reads, and before each asks `trouble(layer, expert, nth read of it)`, which may sleep,
    wait or raise."""

    def __init__(self, store, trouble=lambda layer, expert, nth: None) -> None:
        self.store, self.layers, self.trouble = store, store.layers, trouble
        self.reads: Counter = Counter()
        self._lock = threading.Lock()

    def read(self, layer, expert, into) -> None:
        with self._lock:
            self.reads[layer, expert] += 1
            nth = self.reads[layer, expert]
        for t in into.values():  # what was there is gone: who computes with it too early will show
            t.view(torch.uint8).fill_(0xFF)
        self.trouble(layer, expert, nth)
        self.store.read(layer, expert, into)

    def close(self) -> None:
        self.store.close()


def offload_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "headgate-offload"]


def soon(condition, seconds: float = 20.0) -> bool:
    """Whether it comes true within a while."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def run(engine: Engine, made: list[dict], steps: int = 24, tokens=(1, 1, 5, 40), dtype=torch.float32, **form) -> None:
    """Layers in turn, as a model has them: each output must be that of all weights at hand, to the bit."""
    for i in range(steps):
        layer = i % len(made)
        x, routing = batch(tokens[i // len(made) % len(tokens)], dtype)
        y = engine.compute(layer, x, routing, **form)
        assert torch.equal(y, resident(x, routing, made[layer], **form)), f"step {i}"
    assert not engine.cache.table.busy.any()


def run_at_once(engine: Engine, made: list[dict], threads: int = 4) -> None:
    """Each thread takes layers at random and fetches junk ahead; every output must be that of all weights at hand."""
    wrong: list[str] = []

    def decide(seed: int) -> None:
        own = torch.Generator().manual_seed(seed)
        try:
            for i in range(30):
                layer = int(torch.randint(L, (), generator=own))
                x, routing = batch((1, 1, 20)[i % 3], generator=own)
                engine.prefetch((layer + 1) % L, torch.randperm(E, generator=own)[:2].numpy())
                if not torch.equal(engine.compute(layer, x, routing), resident(x, routing, made[layer])):
                    wrong.append(f"thread {seed}, step {i}")
        except Exception as error:
            wrong.append(f"thread {seed}: {error!r}")

    started = [threading.Thread(target=decide, args=(seed,), daemon=True) for seed in range(threads)]
    for t in started:
        t.start()
    for t in started:
        t.join(120)
    assert not any(t.is_alive() for t in started), "threads wait for each other"
    assert not wrong
    assert not engine.cache.table.busy.any()
