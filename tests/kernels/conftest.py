"""A grouped_ffn problem as one object, so that every test states only what is special about it; a quick interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import pytest
import torch
from interpreter import language_patched_once

from headgate.kernels import Routing, grouped_ffn
from headgate.kernels.activation import as_activation
from headgate.kernels.grouped_ffn import grouped_ffn_reference


@dataclass(frozen=True)
class Problem:
    """`tensors` by name: rows, weights, w_gate_up, w_up (of a pair), w_down, b_gate_up, b_down; those present."""

    tensors: dict[str, torch.Tensor]
    ids: torch.Tensor
    experts: int
    form: dict = field(default_factory=dict)
    needs: tuple[str, ...] | None = None  # the tensors that ask for a gradient; None: all

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, tensors={n: t.detach().to(dtype) for n, t in self.tensors.items()})

    def leaves(self) -> dict[str, torch.Tensor]:
        wanted = self.tensors if self.needs is None else self.needs
        return {n: t.detach().requires_grad_(n in wanted) for n, t in self.tensors.items()}

    def call(self, t: dict[str, torch.Tensor]) -> torch.Tensor:
        w1 = (t["w_gate_up"], t["w_up"]) if "w_up" in t else t["w_gate_up"]
        routing = Routing.from_topk(self.ids, t["weights"], self.experts)
        biases = {n: t[n] for n in ("b_gate_up", "b_down") if n in t}
        return grouped_ffn(t["rows"], routing, w1, t["w_down"], **biases, **self.form)

    def truth(self, t: dict[str, torch.Tensor]) -> torch.Tensor:
        w1 = (t["w_gate_up"], t["w_up"]) if "w_up" in t else t["w_gate_up"]
        form = {n: self.form[n] for n in ("transposed", "interleaved") if n in self.form}
        act = as_activation(self.form.get("activation", "silu"), self.form.get("gated", True))
        return grouped_ffn_reference(
            t["rows"], self.ids, t["weights"], w1, t["w_down"], t.get("b_gate_up"), t.get("b_down"),
            activation=act, **form,
        )  # fmt: skip

    def run(self, grad: torch.Tensor | None = None, truth: bool = False) -> dict[str, torch.Tensor]:
        """y, and the gradient of every tensor that asks for one, by name, for `grad`, the gradient of y (or ones)."""
        leaves = self.leaves()
        y = self.truth(leaves) if truth else self.call(leaves)
        asked = {n: t for n, t in leaves.items() if t.requires_grad}
        grad = torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape) if grad is None else grad.to(y.dtype)
        grads = torch.autograd.grad(y, list(asked.values()), grad) if asked else ()
        return {"y": y.detach(), **dict(zip(asked, grads, strict=True))}


def make(
    R=33, D=70, F=33, E=5, K=2, *, D_out=None, dtype=torch.float32, ids=None, pair=False, bias=False, dead=0.15, **form
) -> Problem:
    """A random problem; ids [R, K] distinct per row, a share `dead` of them -1, unless given."""
    gated, transposed = form.get("gated", True), form.get("transposed", False)
    wide, out = (2 * F if gated and not pair else F), D if D_out is None else D_out

    def weight(rows, columns):
        w = torch.randn(E, rows, columns, dtype=torch.float64) / columns**0.5
        return w.transpose(1, 2).contiguous() if transposed else w

    if ids is None:
        ids = torch.rand(R, E).argsort(1)[:, :K]
        ids = torch.where(torch.rand(R, K) < dead, -1, ids)
    tensors = {
        "rows": torch.randn(R, D, dtype=torch.float64),
        "weights": torch.rand(ids.shape, dtype=torch.float64) + 0.1,
        "w_gate_up": weight(wide, D),
        "w_down": weight(out, F),
    }
    if pair:
        tensors["w_up"] = weight(F, D)
    if bias:
        tensors["b_down"] = torch.randn(E, out, dtype=torch.float64)
        if not pair:
            tensors["b_gate_up"] = torch.randn(E, wide, dtype=torch.float64)
    return Problem(tensors, ids, E, form).to(dtype)


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    if find_spec("triton") is None:
        yield
        return
    with language_patched_once():
        yield


@pytest.fixture
def problem():
    """problem(R, D, F, E, K, dtype=, ids=, pair=, bias=, activation=, gated=, ...) -> Problem."""
    return make


@pytest.fixture
def check(assert_close, tolerance):
    """check(problem, grad=None, scale=1.0): y and every gradient against the reference in float64 on the same numbers.

    The tolerance is that of the rows' type, or of the tensor's own where that is coarser.
    """

    def check(p: Problem, grad: torch.Tensor | None = None, scale: float = 1.0) -> dict[str, torch.Tensor]:
        got, dtype = p.run(grad), p.tensors["rows"].dtype
        want = p.to(torch.float64).run(None if grad is None else grad.double(), truth=True)
        assert got.keys() == want.keys()
        for name, value in got.items():
            kind = dtype if name == "y" else p.tensors[name].dtype
            assert value.dtype == kind, f"{name} must come back in {kind}, got {value.dtype}"
            coarser = max(dtype, kind, key=tolerance)
            assert_close(value, want[name], dtype=coarser, scale=scale, name=name)
        return got

    return check
