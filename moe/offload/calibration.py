"""What few bits cost each expert, measured on calibration tokens; and from it a format for each (EdgeMoE, 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...kernels.grouped_ffn import grouped_ffn
from ...kernels.quantized import FORMATS, quantize
from ...kernels.routing import Routing
from ...placement.caching.precision import Precision, assign
from ..elsewhere import elsewhere_of
from ..experts import Experts
from ..hf.accelerated import device_of, weights_there
from ..hf.table import choice_of
from ..record import Batch, evaluating, inputs_of
from ..shards import shards_of
from .arena import parse_budget
from .forms import Form, experts_in, form_of


@dataclass(frozen=True)
class Sensitivity:
    """Of L layers of E experts in B formats; a layer with fewer experts is filled up with zeros.

    layers   the names of the experts modules, and how many `experts` each has
    formats  what was tried; a choice numbers "as they are" 0 and then these
    error    float64 [L, E, B]: the squared error of an expert's weighted outputs, as a share of their squared size
    size     float64 [L, E]: that squared size, summed over the tokens
    tokens   int64 [L, E]: measured on; where there was none, error and size are 0
    nbytes   int64 [L, E, 1 + B]: of one expert, as it is and in each format
    """

    layers: tuple[str, ...]
    experts: tuple[int, ...]
    formats: tuple[str, ...]
    error: NDArray[np.float64]
    size: NDArray[np.float64]
    tokens: NDArray[np.int64]
    nbytes: NDArray[np.int64]

    def costs(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(error [L, E, B], share [L, E]): what an expert is of its layer's squared output. One that no token reached
        has the mean error of its layer, and the share of one choice of one token."""
        seen = self.tokens > 0
        rows = np.maximum(self.tokens.sum(1, keepdims=True), 1)
        size = np.where(seen, self.size, self.size.sum(1, keepdims=True) / rows)
        whole = self.size.sum(1)
        mean = (self.error * self.size[..., None]).sum(1) / np.where(whole > 0, whole, 1.0)[:, None]
        share = size / np.maximum(size.sum(1, keepdims=True), 1e-300)
        return np.where(seen[..., None], self.error, mean[:, None]), share


def sensitivity(
    model: nn.Module,
    batches: Iterable[Batch] | Batch,
    formats: Sequence[str] = ("int8", "int4"),
    *,
    max_rows: int = 64,
) -> Sensitivity:
    """The error that each format makes of each expert of `model`, on the tokens of `batches` that are routed to it.

    model     a transformers model after `headgate.replace`, or one with `headgate.MoE` layers; run as it is, in eval
              mode and without gradients, so that an expert's inputs are those of the unrounded model
    batches   tensors of input ids [B, S], dicts as a tokenizer returns them, or one of these; tokens with
              attention_mask 0 are left out
    formats   of "fp8", "int8", "int4", "uint4", "mxfp4", with their default blocks, and GGUF's ("Q8_0", "Q4_K", ...)
    max_rows  tokens that an expert is measured on in one forward pass; those that are spread evenly over its own

    Measured where the experts are called: outputs with the stored weights beside outputs with rounded ones, both times
    the router's weights. Memory: an expert's weights in each format, one expert at a time. Cost: rounding every expert
    that got tokens, once a batch, so that few large batches are better than many small ones.

    Raises ValueError / TypeError naming argument, rule and value; the hooks are removed, whatever happens.

    >>> found = sensitivity(model, [tokenizer(texts, return_tensors="pt", padding=True)])
    >>> headgate.offload(model, "4GiB", disk="/scratch", formats=precisions(found, budget="40%"))
    """
    if not formats or any(f not in FORMATS for f in formats) or len(set(formats)) != len(formats):
        raise ValueError(f"sensitivity: formats must be some of {', '.join(FORMATS)}, each once, got {tuple(formats)}")
    if max_rows < 1:
        raise ValueError(f"sensitivity: max_rows must be at least 1, got {max_rows}")
    meter = _Meter(_measurable(model), tuple(formats), max_rows)
    device = device_of(model)
    with evaluating(model), meter.listening(), torch.no_grad():
        for batch in [batches] if isinstance(batches, Tensor | Mapping) else batches:
            inputs = inputs_of(batch, device)
            mask = inputs.get("attention_mask")
            meter.mask = None if mask is None else mask.flatten().bool()
            model(**inputs)
    return meter.result()


def precisions(
    found: Sensitivity, *, budget: str | int | float | None = None, error: float | None = None
) -> dict[str, list[str | None]]:
    """A format (None: as it is) for each expert of each layer, as `headgate.offload` takes them.

    budget   what all experts together may take: "8GiB", bytes, or a share of what they take as they are; the least
             error is sought
    error    what may be wrong: the squared error of a layer's expert outputs as a share of their squared size, as if
             errors of different experts did not meet, on the mean of the layers; the fewest bytes are sought

    Raises ValueError where not one of the two is given, or no choice meets it.
    """
    choice = chosen(found, budget=budget, error=error).choice
    names = (None, *found.formats)
    counts = np.cumsum(found.experts)[:-1]
    parts = zip(found.layers, np.split(choice, counts), strict=True)
    return {layer: [names[c] for c in part] for layer, part in parts}


def chosen(found: Sensitivity, *, budget: str | int | float | None = None, error: float | None = None) -> Precision:
    """What `precisions` puts into names: the choices of all experts, layer by layer, what they cost, and the bound."""
    if (budget is None) == (error is None):
        raise ValueError(f"precisions: one of budget and error must be given, got {budget!r} and {error!r}")
    real = np.arange(found.tokens.shape[1]) < np.array(found.experts)[:, None]
    costs, share = found.costs()
    rounded = np.concatenate([np.zeros((*real.shape, 1)), costs], 2)[real]
    nbytes, uses = found.nbytes[real], share[real] / len(found.layers)
    if budget is None:
        return assign(rounded, nbytes, error_budget=error, uses=uses)
    return assign(rounded, nbytes, budget_bytes=parse_budget(budget, int(nbytes[:, 0].sum())), uses=uses)


def _measurable(model: nn.Module) -> dict[str, tuple[nn.Module, Form]]:
    """The experts modules whose experts can be computed one by one."""
    found, why = {}, "run headgate.replace on a transformers model first"
    for name, module in experts_in(model):
        if elsewhere_of(module) is not None:
            raise ValueError(f"sensitivity: model must not be offloaded, got one whose {name} is")
        form = form_of(module)
        if isinstance(form, str):
            why = form
        elif shards_of(module) is not None or (
            isinstance(module, Experts) and len(module.local_experts) < module.num_experts
        ):
            why = f"{name} holds some of its experts only"
        else:
            found[name] = (module, form)
    if not found:
        raise ValueError(f"sensitivity: model must have experts that run through Headgate, got none: {why}")
    return found


class _Meter:
    """Sums of squared errors and sizes, which hooks before the experts modules add to."""

    def __init__(self, layers: dict[str, tuple[nn.Module, Form]], formats: tuple[str, ...], max_rows: int) -> None:
        self.layers, self.formats, self.max_rows = layers, formats, max_rows
        self.mask: Tensor | None = None
        self.experts = tuple(len(form.weights(module)["w_down"]) for module, form in layers.values())
        shape = len(layers), max(self.experts)
        self.wrong, self.size = np.zeros((*shape, len(formats))), np.zeros(shape)
        self.tokens = np.zeros(shape, np.int64)

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for layer, (module, form) in enumerate(self.layers.values()):
                hook = module.register_forward_pre_hook(self._before(layer, form), with_kwargs=True)
                hooks.callback(hook.remove)
            yield

    def _before(self, layer: int, form: Form):
        def before(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
            x, ids, weights = _call(module, args, kwargs)
            live = torch.ones(len(ids), dtype=torch.bool, device=ids.device) if self.mask is None else self.mask
            if len(live) != len(ids):
                raise ValueError(
                    f"sensitivity: attention_mask must have a place for each of {len(ids)} tokens, got {len(live)}"
                )
            with weights_there(module):
                for e in range(self.experts[layer]):
                    token, k = torch.nonzero((ids == e) & live[:, None], as_tuple=True)
                    if len(token):
                        kept = min(len(token), self.max_rows)
                        some = torch.linspace(0, len(token) - 1, kept, device=token.device).long()
                        token, k = token[some], k[some]
                        rows, by = x[token], weights[token, k][:, None]
                        if getattr(module, "weights_on_input", False):
                            rows, by = (rows * by).to(rows.dtype), torch.ones_like(by)
                        self._measure(layer, e, form.weights(module), form, rows, by)

        return before

    def _measure(self, layer: int, e: int, weights: Mapping[str, Tensor], form: Form, x: Tensor, by: Tensor) -> None:
        """Adds what expert e makes of rows x [n, D], times `by` [n, 1]."""
        alone = _alone(weights, e, form)
        routing = Routing.from_topk(torch.zeros(len(x), 1, dtype=torch.int32, device=x.device), by, 1)
        rest: dict[str, Any] = {n: w for n, w in alone.items() if n.startswith("b_")}
        rest |= {"activation": form.activation, "interleaved": form.interleaved}
        x = x.to(alone["w_down"].dtype)
        want = grouped_ffn(x, routing, alone["w_gate_up"], alone["w_down"], **rest).double()
        self.size[layer, e] += want.square().sum().item()
        self.tokens[layer, e] += len(x)
        for b, kind in enumerate(self.formats):
            w1, w2 = (quantize(alone[name], kind) for name in ("w_gate_up", "w_down"))
            got = grouped_ffn(x, routing, w1, w2, **rest).double()
            self.wrong[layer, e, b] += (got - want).square().sum().item()

    def result(self) -> Sensitivity:
        if not self.tokens.any():
            raise ValueError("sensitivity: batches must hold at least one token that reaches an expert, got none")
        error = self.wrong / np.where(self.size > 0, self.size, 1.0)[..., None]
        nbytes = np.zeros((*self.size.shape, 1 + len(self.formats)), np.int64)
        for layer, (module, form) in enumerate(self.layers.values()):
            alone = {n: w.to("meta") for n, w in _alone(form.weights(module), 0, form).items()}
            biases = sum(w.nbytes for n, w in alone.items() if n.startswith("b_"))
            matrices = [w for n, w in alone.items() if n.startswith("w_")]
            rounded = [sum(quantize(w, kind).nbytes for w in matrices) for kind in self.formats]
            nbytes[layer, : self.experts[layer]] = biases + np.array([sum(w.nbytes for w in matrices), *rounded])
        return Sensitivity(tuple(self.layers), self.experts, self.formats, error, self.size, self.tokens, nbytes)


def _alone(weights: Mapping[str, Tensor], e: int, form: Form) -> dict[str, Tensor]:
    """The weights [1, out, in] of one expert."""
    return {
        name: w[e : e + 1].transpose(1, 2) if form.transposed and name.startswith("w_") else w[e : e + 1]
        for name, w in weights.items()
    }


def _call(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [T, D], ids [T, K], router weights [T, K]) of a call of an experts module."""
    x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
    if "routing" in kwargs or (len(args) > 1 and isinstance(args[1], Routing)):
        routing = kwargs["routing"] if "routing" in kwargs else args[1]
        ids, weights = routing.expert_ids, routing.weights
    else:
        choice = choice_of(module)
        assert choice is not None
        ids, weights = choice(module, args, kwargs, None)
    return x.detach().flatten(0, -2), ids.detach().flatten(0, -2), weights.detach().flatten(0, -2)
