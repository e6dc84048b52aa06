"""Bounds: the matmuls alone. Inputs lie ready in expert order, outputs are allocated beforehand; nothing is gathered,
activated, weighted or summed, so no implementation built on the same matmul can be faster."""

from __future__ import annotations

import torch

from .shapes import Problem


class Matmuls:
    """One call per routing of the problem: two matmuls per expert hit (forward), or all six (train).

    `dense`: the same FLOPs as one matmul per projection, all rows through the first expert's weights.
    """

    def __init__(self, problem: Problem, train: bool, dense: bool = False) -> None:
        self.train = train
        s, p = problem.shape, problem.parameters
        with torch.no_grad():
            self.w1, self.w2 = p["gate_up_proj"].detach(), p["down_proj"].detach()
            if not s.transposed:  # as [E, in, out] views, the right side of rows @ w
                self.w1, self.w2 = self.w1.transpose(1, 2), self.w2.transpose(1, 2)
            self.transposed = s.transposed
            self.calls = []
            for i in range(len(problem.routings)):
                counts = problem.counts(i)
                groups = [(0, sum(counts))] if dense else [(e, n) for e, n in enumerate(counts) if n]
                self.calls.append(groups)
            n, like = problem.tokens * s.top_k, problem.x
            self.x, self.y = like.new_empty(n, s.hidden).normal_(), like.new_empty(n, s.hidden).normal_()
            self.h, self.a = like.new_empty(n, 2 * s.intermediate), like.new_empty(n, s.intermediate).normal_()
            if train:
                experts = 1 if dense else s.experts
                self.dx, self.da = torch.empty_like(self.x), torch.empty_like(self.a)
                self.dw1 = torch.empty_like(p["gate_up_proj"][:experts])
                self.dw2 = torch.empty_like(p["down_proj"][:experts])

    @torch.no_grad()
    def __call__(self, call: int) -> None:
        lo = 0
        for e, n in self.calls[call]:
            rows = slice(lo, lo + n)
            torch.mm(self.x[rows], self.w1[e], out=self.h[rows])
            torch.mm(self.a[rows], self.w2[e], out=self.y[rows])
            lo += n
        if self.train:
            self._backward(self.calls[call])

    def _backward(self, groups: list[tuple[int, int]]) -> None:
        # y stands for its own gradient and h for its own: the values do not matter, the sizes and strides do
        lo = 0
        for e, n in groups:
            rows = slice(lo, lo + n)
            x, h, a, y = self.x[rows], self.h[rows], self.a[rows], self.y[rows]
            torch.mm(y, self.w2[e].T, out=self.da[rows])
            torch.mm(*((a.T, y) if self.transposed else (y.T, a)), out=self.dw2[e])
            torch.mm(h, self.w1[e].T, out=self.dx[rows])
            torch.mm(*((x.T, h) if self.transposed else (h.T, x)), out=self.dw1[e])
            lo += n
