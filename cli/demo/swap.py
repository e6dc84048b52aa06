"""Chapter: replace the MoE blocks and measure how far outputs and gradients move."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ...bench import html
from ...bench.olmoe import Model, build
from ...moe.hf import replace, restore
from .model import RIVALS, implementation, parameters
from .tour import Tour

WINDOWS = 2  # of held-out text: gradients of every parameter make this as expensive as a training step


@dataclass(frozen=True)
class Difference:
    """Largest difference relative to the largest magnitude: of the logits, and of the worst parameter's gradient."""

    output: float
    gradient: float
    worst_parameter: str
    choices_moved: int  # (token, expert) choices that differ: ties broken by the last bit
    choices: int


def run(tour: Tour) -> None:
    shape, screen = tour.options.shape, tour.screen
    model = build(shape, tour.options.seed)
    total, active = parameters(model)
    screen.say(
        f"  OLMoE, {shape.layers} layers of {shape.experts} experts, {shape.top_k} per token, hidden size "
        f"{shape.hidden}: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M per token, random weights"
    )
    batch = tour.corpus.held_out_batches(WINDOWS, shape.length, 1)[0]
    passes = {name: _one_pass(model, batch, name) for name in (*RIVALS, "headgate")}
    ours = _difference(passes["headgate"], passes[RIVALS[0]])
    theirs = _difference(passes[RIVALS[1]], passes[RIVALS[0]])
    replaced = replace(model).replaced
    restore(model)
    tour.model = model
    tour.metrics["swap"] = {
        "parameters": total,
        "parameters_per_token": active,
        "blocks_replaced": replaced,
        "dtype": "float32",
        "headgate_against_eager": asdict(ours),
        "grouped_mm_against_eager": asdict(theirs),
    }
    screen.say(f"  {len(replaced)} of {shape.layers} MoE blocks replaced; largest relative difference in float32")
    screen.table(
        [
            ("", "output", "gradients"),
            ("headgate against transformers' eager", f"{ours.output:.1e}", f"{ours.gradient:.1e}"),
            ("transformers' grouped_mm against eager", f"{theirs.output:.1e}", f"{theirs.gradient:.1e}"),
        ]
    )
    if ours.choices_moved:
        screen.say(f"  {ours.choices_moved} of {ours.choices:,} expert choices fell the other way (near ties)")


def _one_pass(model: Model, batch: Tensor, name: str) -> dict[str, Tensor]:
    """Logits, the experts chosen, and every gradient, of one forward and backward pass."""
    with implementation(model, name):
        model.zero_grad()
        out = model(input_ids=batch, labels=batch, output_router_logits=True)
        out.loss.backward()
        top_k = model.config.num_experts_per_tok
        chosen = torch.stack([scores.topk(top_k).indices.sort().values for scores in out.router_logits])
        found = {"logits": out.logits.detach(), "chosen": chosen}
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> Difference:
    relative = {
        name: float((one[name] - value).abs().max() / value.abs().max().clamp_min(1e-30))
        for name, value in other.items()
        if name != "chosen"
    }
    output = relative.pop("logits")
    worst = max(relative, key=lambda name: relative[name])
    moved = int((one["chosen"] != other["chosen"]).sum())
    return Difference(output, relative[worst], worst.removeprefix("grad "), moved, one["chosen"].numel())


def section(tour: Tour) -> str:
    found = tour.metrics["swap"]
    ours, theirs = found["headgate_against_eager"], found["grouped_mm_against_eager"]
    rows = [
        ["", "output", "gradients"],
        ["headgate against eager", f"{ours['output']:.1e}", f"{ours['gradient']:.1e}"],
        ["grouped_mm against eager", f"{theirs['output']:.1e}", f"{theirs['gradient']:.1e}"],
    ]
    return html.prose(
        f"<code>headgate.replace(model)</code> took {len(found['blocks_replaced'])} MoE blocks of a transformers "
        f"OLMoE model with {found['parameters'] / 1e6:.1f} million parameters, "
        f"{found['parameters_per_token'] / 1e6:.1f} million of them met by each token. The weights stay where they "
        "are, under the names they had. The table gives the largest difference, relative to the largest value, "
        "in float32 on held-out text; the second row says how far transformers' own two implementations are apart."
    ) + html.table(rows)
