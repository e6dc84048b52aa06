"""Checks on many ranks: formats of rows on the way. See ranks.py."""

from __future__ import annotations

import torch
from dispatch_cases import D, bytes_between_ranks, cases, check, close, make

from headgate.dispatch import AllToAll


def bound(t: torch.Tensor, wire: str) -> torch.Tensor:
    """The stated largest error of each element (dispatch/wire.py), and 2^-22 of the row's largest for arithmetic."""
    if wire == "exact" or not t.numel():
        return torch.zeros_like(t)
    m = t.abs().amax(1, keepdim=True)
    if wire == "bf16":
        return t.abs() * 2**-8 + 2**-134
    s = (m / (448 if wire == "fp8" else 127)).clamp_min(2**-126)
    error = torch.maximum(t.abs() * 2**-4, s * 2**-10) if wire == "fp8" else (s / 2).expand_as(t)
    return error + 2**-22 * m


def grown(t: torch.Tensor, error: torch.Tensor, wire: str) -> torch.Tensor:
    """The bound after another rounding of numbers that are already off by `error`."""
    return error + bound(t.abs() + error, wire)


def wires_keep_their_bounds(name):
    for wire in ("bf16", "fp8", "int8"):
        exact, lossy = make(name), make(name, wire=wire)
        levels = 2 if name == "hierarchical" else 1
        case = cases(name)["uneven"]
        x = case.mine(case.x)
        rows, local, ticket = exact.dispatch(x, case.routing())
        coarse, same, coarse_ticket = lossy.dispatch(x, case.routing())
        assert torch.equal(local.expert_ids, same.expert_ids), wire
        assert torch.equal(local.weights, same.weights), wire
        allowed = torch.zeros_like(rows)
        for _ in range(levels):
            allowed = grown(rows, allowed, wire)
        assert ((rows - coarse).abs() <= allowed).all(), f"{wire}: dispatch"
        assert not len(rows) or not torch.equal(rows, coarse), f"{wire}: dispatch is not lossy at all"
        y, coarse_y = exact.combine(rows, ticket), lossy.combine(rows, coarse_ticket)
        value, allowed = rows, torch.zeros_like(rows)
        ticket = getattr(ticket, "ticket", ticket)  # that of the dispatcher chosen
        routes = ticket.routes if hasattr(ticket, "routes") else (ticket.route,)
        for route in reversed(routes):
            error = grown(value, allowed, wire)
            value, _ = route.back(value, [], "exact")
            allowed, _ = route.back(error, [], "exact")
        allowed = allowed[: len(y)] + 1e-9
        assert ((y - coarse_y).abs() <= allowed).all(), f"{wire}: combine"


def wires_of_the_backward_pass(name):
    case = cases(name)["even"]
    for wire in ("bf16", "fp8", "int8"):
        gradients, outputs = [], []
        for formats in ("exact", wire, (wire, "exact"), ("exact", wire)):
            d = make(name, backward_wire=formats)
            x = case.mine(case.x).clone().requires_grad_()
            rows, _, ticket = d.dispatch(x, case.routing())
            y = d.combine(rows, ticket)
            (y * case.mine(case.g)).sum().backward()
            gradients.append(x.grad)
            outputs.append(y.detach())
        assert torch.equal(outputs[0], outputs[1]), f"{wire}: forward"
        differs = [not torch.equal(gradients[0], g) for g in gradients[1:]]
        assert all(differs), f"{wire}: backward is exact"
        close(gradients[1], gradients[0], wire, {"bf16": 2e-2, "fp8": 0.3, "int8": 5e-2}[wire])


@check
def narrow_rows_are_fewer_bytes():
    size = {"exact": 8 * D, "bf16": 2 * D, "fp8": D + 4, "int8": D + 4}
    case = cases("all_to_all")["even"]
    for wire, each in size.items():
        d = AllToAll(wire=("exact", wire))
        with bytes_between_ranks() as seen:
            rows, _, ticket = d.dispatch(case.mine(case.x), case.routing())
            d.combine(rows, ticket)
        assert seen[-1][1] == [n * each for n in ticket.routes[0].received], wire


@check
def a_row_with_an_overflow_arrives_as_nan():
    case = cases("all_to_all")["even"]
    case.x[3, 1] = float("inf")
    for wire in ("fp8", "int8"):
        rows, _, ticket = AllToAll(wire=(wire, "exact")).dispatch(case.mine(case.x), case.routing())
        y = AllToAll().combine(rows, ticket)
        broken = torch.zeros(len(case.x), D, dtype=torch.bool)
        broken[3] = True
        assert torch.equal(y.isnan(), case.mine(broken)), wire
