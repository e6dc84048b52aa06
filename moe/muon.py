"""Muon: whole stacks of experts in one orthogonalisation, under every fold; AdamW for what is no hidden matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from ..kernels.newton_schulz import COEFFICIENTS, newton_schulz
from .matrices import Stack, chosen, stack_of, stacks_in
from .ranks.whole import Slices, on_whole_units

TOGETHER = 1 << 26  # elements of matrices that are updated in one go
IN_CACHE = 1 << 18  # the same of experts on a CPU

Group = dict[str, Any]
_OWN = ("_muon", "_other", "_adamw", "_model", "_ns_dtype")  # of an optimizer that is copied or pickled


class Muon(torch.optim.Optimizer):
    """Muon for matrices [out, in] and stacks of experts [E, out, in], AdamW for everything else: one optimizer.

        M <- momentum * M + (1 - momentum) * G;   U = (1 - momentum) * G + momentum * M if nesterov else M
        W <- (1 - lr * weight_decay) * W - lr * scale * newton_schulz(U),   for each matrix

    `model`: the module; this rule says which update a parameter gets:

    "muon"   weights of experts [E, ., .] (Headgate's, and transformers' behind its experts interface), shared experts,
             weights of nn.Linear: attention, dense feed-forward blocks
    "adamw"  all others: embeddings and what is tied to them, the head (`get_output_embeddings()`, or a last name such
             as lm_head), routers (a Router, or a last name such as gate), norms, biases, LoRA, linear layers of one
             row or column

    Or parameter groups as torch.optim takes them, in which "algorithm" says "muon" or "adamw"; without it "muon",
    which takes parameters of 2 and 3 dimensions only. `Muon.groups(model)` are the groups of the rule, to be changed.
    On many ranks give `model=` beside groups: it knows how experts are cut.

    lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps  as torch.optim.Muon; lr also for AdamW
    adjust_lr_fn   the scale. "match_rms_adamw": 0.2 sqrt(max(out, in)), with which AdamW's lr serves both (Moonlight);
                   "original": sqrt(max(1, out / in)), torch's default
    split_gate_up  gate and up are two matrices [F, in] in place of the one [2F, in] that is stored, where they are
                   stored one after the other: fewer FLOPs, where 2F is not much less than in
    adamw          settings of the "adamw" groups, as torch.optim.AdamW takes them; default betas (0.9, 0.95) and lr
                   and weight_decay of Muon
    ns_dtype       what Newton-Schulz is computed in, see kernels.newton_schulz; None: bf16 on CUDA, fp32 on CPU

    Under `parallelize` (make the optimizer after it) the update is that of one process: experts over ep and edp, and
    shards of FSDP2 along E, are whole matrices, which need no communication. Of those cut over etp, by FSDP2 or by
    tensor parallelism the slices change places by an all-to-all, so that each matrix is computed on one rank, and the
    result goes back by another; where two dimensions of a mesh cut it (FSDP2 and tensor parallelism), each rank gathers
    it. Every rank must come by, with gradients for the same parameters.

    It is a torch.optim.Optimizer: schedulers, `state_dict`, `save_checkpoint`, `migrate` and hooks work. State:
    "momentum_buffer" of the parameter's shape and dtype; AdamW's own for the rest.

    Raises ValueError / TypeError naming argument, rule and value; sparse or complex gradients before anything is
    changed. Sources: Jordan et al., Muon (2024); Liu et al., Muon is Scalable for LLM Training (2025).

    >>> layer = headgate.MoE(64, 32, num_experts=8, top_k=2)
    >>> optimizer = headgate.Muon(layer, lr=1e-3)
    >>> [(g["algorithm"], len(g["params"])) for g in optimizer.param_groups]
    [('muon', 2), ('adamw', 1)]
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        *,
        split_gate_up: bool = False,
        adamw: dict[str, Any] | None = None,
        ns_dtype: torch.dtype | None = None,
        model: nn.Module | None = None,
    ) -> None:
        settings: Group = {"weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "eps": eps}
        settings |= {"ns_coefficients": tuple(ns_coefficients), "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        self._muon: Group = {"lr": lr, **settings, "split_gate_up": split_gate_up}
        _check("", self._muon)
        self._model = params if isinstance(params, nn.Module) else model
        if self._model is not None and not isinstance(self._model, nn.Module):
            raise TypeError(f"Muon: model must be a torch.nn.Module or None, got {type(model).__name__}")
        self._ns_dtype = ns_dtype
        newton_schulz(torch.zeros(0, 1, 1), dtype=ns_dtype)  # or it says what the dtype must be
        given = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.95), **(adamw or {})}
        self._adamw = torch.optim.AdamW([torch.zeros(0)], **given)
        self._other: Group = {k: v for k, v in self._adamw.param_groups[0].items() if k != "params"}
        groups: Any = self.groups(params) if isinstance(params, nn.Module) else params
        super().__init__(groups, {"lr": lr})
        self._adamw.state = self.state

    @staticmethod
    def groups(model: nn.Module) -> list[Group]:
        """The groups of a model by the rule, each with "params" and "algorithm"; none that is empty."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"Muon: model must be a torch.nn.Module, got {type(model).__name__}")
        both = zip(("muon", "adamw"), chosen(model), strict=True)
        return [{"params": list(found.values()), "algorithm": kind} for kind, found in both if found]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{k: vars(self)[k] for k in _OWN}}

    def add_param_group(self, param_group: Group) -> None:
        if not isinstance(param_group, dict):
            raise TypeError(f"Muon: param_group must be a dict, got {type(param_group).__name__}")
        kind = param_group.setdefault("algorithm", "muon")
        if kind not in ("muon", "adamw"):
            raise ValueError(f'Muon: algorithm must be "muon" or "adamw", got {kind!r}')
        params = param_group["params"]
        param_group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
        for key, value in (self._muon if kind == "muon" else self._other).items():
            param_group.setdefault(key, value)
        if kind == "muon":
            _check(f" of group {len(self.param_groups)}", param_group)
            for i, p in enumerate(p if isinstance(p, Tensor) else p[1] for p in params):
                self._check_matrix(f"parameter {i} of group {len(self.param_groups)}", p)
        super().add_param_group(param_group)

    def _check_matrix(self, what: str, p: Any) -> None:
        if isinstance(p, Tensor) and (p.dim() not in (2, 3) or not p.is_floating_point()):
            rule = "must be [out, in] or [E, out, in] and real, or in a group with algorithm='adamw'"
            raise ValueError(f"Muon: {what} {rule}, got {tuple(p.shape)} {p.dtype}")
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self._model is None and many and not isinstance(p, DTensor):
            raise ValueError(f"Muon: model must be given beside groups on many ranks, got None with {what}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        stacks = {} if self._model is None else stacks_in(self._model)
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                self._step(group, stacks)
        self._step_others()
        return loss

    def _check_gradients(self) -> None:
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p.grad is not None and (p.grad.is_sparse or p.grad.is_complex()):
                    kind = "sparse" if p.grad.is_sparse else "complex"
                    raise ValueError(f"Muon: gradients must be dense and real, got a {kind} one, {j} of group {i}")

    def _step_others(self) -> None:
        """AdamW on its groups, DTensors and plain tensors each for themselves: they do not mix in one call."""
        groups = [g for g in self.param_groups if g["algorithm"] == "adamw"]
        self._adamw.param_groups, self._adamw.state = [], self.state
        for group in groups:
            for sharded in (False, True):
                some = [p for p in group["params"] if isinstance(p, DTensor) == sharded]
                self._adamw.param_groups.append({**group, "params": some})
        self._adamw.step()

    def _step(self, group: Group, stacks: dict[nn.Parameter, Stack]) -> None:
        alone, company = list[_Update](), dict[tuple[dist.ProcessGroup, torch.dtype], list[_Update]]()
        orthogonal = _Orthogonal(group, self._ns_dtype)
        for p in group["params"]:
            if p.grad is None:
                continue
            cut = stack_of(p, stacks.get(p, Stack()))
            if p.dim() == 3 and cut is not None and cut.group is None:
                self._in_turn(p, group, cut, orthogonal)
                continue
            update = self._look_ahead(p, group, stacks.get(p, Stack()), cut)
            among = update.stack.group
            (alone if among is None else company.setdefault((among, update.matrices.dtype), [])).append(update)
        for some in _alike(alone):
            stack = some[0].stack
            units = stack.units(some[0].matrices if len(some) == 1 else torch.cat([u.matrices for u in some]))
            found = stack.joined(orthogonal(units, stack)).split([len(u.matrices) for u in some])
            for update, result in zip(some, found, strict=True):
                update.apply(result, group)
        for (among, _), updates in company.items():
            for some in _in_pieces(updates):
                whole = partial(_of_place, orthogonal, [u.stack for u in some])
                done = on_whole_units([u.slices() for u in some], among, whole)
                for update, result in zip(some, done, strict=True):
                    update.apply(update.stack.joined(result), group)

    def _in_turn(self, p: nn.Parameter, group: Group, stack: Stack, orthogonal: _Orthogonal) -> None:
        """Whole experts, a few after the other: what is made on the way stays small, and its memory is used again."""
        w, (buffer, grad) = _local(p), self._moments(p)
        each = max(1, (TOGETHER if w.is_cuda else IN_CACHE) // max(1, w.shape[1] * w.shape[2]))
        for some, b, g in zip(w.split(each), buffer.split(each), grad.split(each), strict=True):
            result = stack.joined(orthogonal(stack.units(_ahead(b, g, group)), stack))
            _move(some, result, group, _scale(list(w.shape[1:]), stack, group))
        torch.autograd.graph.increment_version(p)

    def _moments(self, p: nn.Parameter) -> tuple[Tensor, Tensor]:
        """(momentum, gradient) as this rank has them."""
        state, grad = self.state[p], p.grad
        assert grad is not None
        if isinstance(grad, DTensor) and isinstance(p, DTensor) and grad.placements != p.placements:
            grad = grad.redistribute(placements=p.placements)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        return _local(state["momentum_buffer"]), _local(grad)

    def _look_ahead(self, p: nn.Parameter, group: Group, stack: Stack, cut: Stack | None) -> _Update:
        """Moves the momentum; the matrices that are to be made orthogonal."""
        ahead = _ahead(*self._moments(p), group)
        if cut is None:  # by several dimensions of the mesh: every rank gathers it
            assert isinstance(p, DTensor)
            ahead = DTensor.from_local(ahead, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            return _Update(p, _three(ahead.full_tensor()), stack, gathered=True)
        return _Update(p, _three(ahead), cut)


@dataclass(frozen=True)
class _Update:
    """A parameter and its matrices [e, m, n], as this rank has them or, where `gathered`, whole."""

    parameter: nn.Parameter
    matrices: Tensor
    stack: Stack
    gathered: bool = False

    def slices(self) -> Slices:
        return self.stack.slices(self.matrices)

    def elements(self) -> int:
        """Of its matrices here; where ranks cut them, of the largest part, so that all ranks of the group agree."""
        e, m, n = self.matrices.shape
        if self.stack.group is None:
            return e * m * n
        return e * (n if self.stack.ffn == 1 else m) * self.stack.blocks * max(self.stack.sizes)

    def apply(self, update: Tensor, group: Group) -> None:
        """`update`: [e, m, n] as `matrices`."""
        p = self.parameter
        update = update if p.dim() == 3 else update[0]
        if self.gathered:
            assert isinstance(p, DTensor)
            whole = DTensor.from_local(update, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
            update = whole.redistribute(placements=p.placements).to_local()
        _move(_local(p), update, group, _scale(list(self.matrices.shape[1:]), self.stack, group))
        torch.autograd.graph.increment_version(p)


def _ahead(buffer: Tensor, grad: Tensor, group: Group) -> Tensor:
    """Moves the momentum, in place; what is to be made orthogonal."""
    buffer.lerp_(grad, 1 - group["momentum"])
    return grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def _move(w: Tensor, update: Tensor, group: Group, scale: float) -> None:
    lr = float(group["lr"])
    w.mul_(1 - lr * group["weight_decay"])
    w.add_(update, alpha=-lr * scale)


def _scale(shape: list[int], stack: Stack, group: Group) -> float:
    """By the whole matrix of which this rank has a part of `shape`."""
    if stack.group is not None:
        shape[stack.ffn - 1] = sum(stack.sizes) * stack.blocks
    if group["split_gate_up"]:
        shape[stack.ffn - 1] //= stack.blocks
    rows, columns = shape if stack.rows == 1 else shape[::-1]
    if group["adjust_lr_fn"] == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


@dataclass(frozen=True)
class _Orthogonal:
    """Newton-Schulz of units [e, blocks, m, n], block by block or of the matrix that the blocks make."""

    group: Group
    dtype: torch.dtype | None

    def __call__(self, units: Tensor, stack: Stack) -> Tensor:
        g = self.group
        how: Any = (g["ns_coefficients"], g["ns_steps"], g["eps"], self.dtype)
        if g["split_gate_up"] or units.shape[1] == 1:
            return newton_schulz(units.flatten(0, 1), *how).unflatten(0, units.shape[:2])
        return stack.units(newton_schulz(stack.joined(units), *how))


def _of_place(orthogonal: _Orthogonal, stacks: list[Stack], units: Tensor, place: int) -> Tensor:
    return orthogonal(units, stacks[place])


def _alike(updates: list[_Update]) -> Iterator[list[_Update]]:
    """Those of one shape together, so many that their elements are TOGETHER at most; a large one by itself."""
    by_shape: dict[tuple, list[_Update]] = {}
    for u in updates:
        key = (*u.matrices.shape[1:], u.stack, u.matrices.dtype, u.matrices.device)
        by_shape.setdefault(key, []).append(u)
    for some in by_shape.values():
        yield from _in_pieces(some)


def _in_pieces(updates: list[_Update]) -> Iterator[list[_Update]]:
    some, elements = list[_Update](), 0
    for u in updates:
        size = u.elements()
        if some and elements + size > TOGETHER:
            yield some
            some, elements = [], 0
        some.append(u)
        elements += size
    if some:
        yield some


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t.detach()


def _three(t: Tensor) -> Tensor:
    return t if t.dim() == 3 else t[None]


def _check(where: str, group: Group) -> None:
    for name in ("lr", "weight_decay", "momentum", "eps"):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
            raise TypeError(f"Muon: {name}{where} must be a number, got {value!r}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Muon: {name}{where} must be one number, got {tuple(value.shape)}")
        if not 0 <= float(value) < math.inf or (name == "momentum" and value >= 1):
            raise ValueError(
                f"Muon: {name}{where} must be at least 0{' and below 1' * (name == 'momentum')}, got {value}"
            )
    steps, coefficients = group["ns_steps"], group["ns_coefficients"]
    if not isinstance(steps, int) or not 0 < steps < 100:
        raise ValueError(f"Muon: ns_steps{where} must be between 1 and 99, got {steps!r}")
    if len(coefficients) != 3:
        raise ValueError(f"Muon: ns_coefficients{where} must be three numbers, got {coefficients!r}")
    if group["adjust_lr_fn"] not in ("original", "match_rms_adamw"):
        got = f"got {group['adjust_lr_fn']!r}"
        raise ValueError(f'Muon: adjust_lr_fn{where} must be "original" or "match_rms_adamw", {got}')
