"""Everything that may compute the experts on a GPU: what imports takes part, what does not is named with the reason.

A builder takes the problem and returns (x [T, D], ids [T, K], weights [T, K]) -> y [T, D] on the problem's own weights.
Where a rival wants them in another layout they are brought into it once, outside the clock.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rivals as cpu
from ..machine import version
from ..rivals import Builder, Forward
from ..shapes import Problem


class NotServed(RuntimeError):
    """A rival cannot compute this case; the message says why."""


@dataclass(frozen=True)
class Rival:
    """`packages` must import, the first one's version is told. `trains`: has a backward pass. `most_tokens`: beyond, it
    needs too much time or memory to be worth it. `graphs`: may be captured in a CUDA graph (a few wait for the GPU)."""

    build: Builder
    about: str
    packages: tuple[str, ...] = ()
    distribution: str | None = None
    trains: bool = True
    most_tokens: int | None = None
    fewest_tokens: int = 1
    graphs: bool = True


def absent(name: str) -> str | None:
    """Why a contestant cannot take part on this machine; None if it can."""
    for package in RIVALS[name].packages:
        try:
            importlib.import_module(package)
        except Exception as error:  # whatever a foreign package does when it is imported
            said = " ".join(f"{type(error).__name__}: {error}".split())
            return f"{package} does not import ({said[:200]})"
    return None


def version_of(name: str) -> str | None:
    rival = RIVALS[name]
    if not rival.packages:
        return version("headgate") if name == "headgate" else torch.__version__
    package = importlib.import_module(rival.packages[0].split(".")[0])
    return version(rival.distribution or package.__name__) or getattr(package, "__version__", None)


def _plain_form(problem: Problem, who: str) -> None:
    s = problem.shape
    if s.bias or s.interleaved or s.transposed or s.activation != "silu":
        raise NotServed(f"{who} serves gated silu on [E, 2F, D] without bias only, not {s.name}'s form")


def _gate(problem: Problem, h: Tensor) -> Tensor:
    s = problem.shape
    g, u = (h[:, 0::2], h[:, 1::2]) if s.interleaved else h.chunk(2, dim=1)
    return F.silu(g) * u if s.activation == "silu" else s.form(g, u)


def torch_grouped(problem: Problem) -> Forward:
    """torch's grouped matrix product as a careful user calls it: rows sorted once, no wait for the device."""
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    s, p = problem.shape, problem.parameters
    w1, w2 = (p[n] if s.transposed else p[n].transpose(1, 2) for n in ("gate_up_proj", "down_proj"))

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        experts, order = torch.sort(flat, stable=True)
        ends = torch.searchsorted(experts, torch.arange(s.experts, device=x.device), right=True).to(torch.int32)
        h = grouped_mm(x[order // s.top_k], w1, offs=ends)
        if s.bias:
            h = h + p["gate_up_proj_bias"][experts]
        a = _gate(problem, h).to(x.dtype)
        scale = weights.reshape(-1)[order, None].to(x.dtype)
        y = grouped_mm(a * scale, w2, offs=ends)
        if s.bias:
            y = y + p["down_proj_bias"][experts] * scale
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
        return y[back].view(x.shape[0], s.top_k, -1).sum(1)

    return forward


def scattermoe(problem: Problem) -> Forward:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    s, p = problem.shape, problem.parameters
    w1, w2 = (p[n] if s.transposed else p[n].transpose(1, 2) for n in ("gate_up_proj", "down_proj"))
    b1, b2 = p.get("gate_up_proj_bias"), p.get("down_proj_bias")

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sort = flatten_sort_count(ids, num_experts=s.experts)
        h = parallel_linear(x, w1, s.top_k, *sort, expert_biases=b1, grouped_out=True)
        a = _gate(problem, h).to(x.dtype)
        return parallel_linear(a, w2, 1, *sort, expert_biases=b2, grouped_in=True, gates=weights.to(x.dtype))

    return forward


def liger(problem: Problem) -> Forward:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    _plain_form(problem, "Liger")
    p = problem.parameters

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x, p["gate_up_proj"], p["down_proj"], ids.to(torch.int32), weights)

    return forward


def sonicmoe(problem: Problem) -> Forward:
    import inspect

    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    _plain_form(problem, "SonicMoE")
    s, p = problem.shape, problem.parameters
    known = inspect.signature(moe_general_routing_inputs).parameters
    w1, w2 = p["gate_up_proj"].permute(1, 2, 0), p["down_proj"].permute(1, 2, 0)
    more: dict[str, object] = {}
    if "concat_layout" in known:
        more["concat_layout"] = True
    elif "is_concatenated_gate_up" in known:
        more["is_concatenated_gate_up"] = True
    else:  # rows gate, up, gate, up, ...: a copy that stands in for the weights
        pair = p["gate_up_proj"].detach().unflatten(1, (2, s.intermediate)).transpose(1, 2).flatten(1, 2).contiguous()
        w1 = pair.requires_grad_().permute(1, 2, 0)
    tokens = torch.arange(problem.tokens, device=problem.x.device, dtype=torch.int32).repeat_interleave(s.top_k)
    stream = None if known["stream_id"].default is None else torch.cuda.current_stream().cuda_stream

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_general_routing_inputs(
            x, weights.reshape(-1), tokens, ids.reshape(-1).int(), w1, None, w2, None,
            E=s.experts, stream_id=stream, activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(), **more,
        )[0]  # fmt: skip

    return forward


def deep_gemm(problem: Problem) -> Forward:
    """DeepGEMM's two grouped products between hand-written sorting and weighting; groups are padded to its 128 rows."""
    from deep_gemm import m_grouped_bf16_gemm_nt_contiguous as product

    _plain_form(problem, "DeepGEMM (as called here)")
    s, p = problem.shape, problem.parameters
    w1, w2 = p["gate_up_proj"].detach(), p["down_proj"].detach()
    pairs = problem.tokens * s.top_k
    room = (pairs // 128 + min(s.experts, pairs)) * 128

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        experts, order = torch.sort(ids.reshape(-1), stable=True)
        first = torch.searchsorted(experts, torch.arange(s.experts + 1, device=x.device))
        padded = (first.diff() + 127) // 128 * 128
        start = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
        place = start[experts] + torch.arange(pairs, device=x.device) - first[experts]
        owner = torch.searchsorted(start[1:], torch.arange(room, device=x.device), right=True)
        owner = torch.where(owner < s.experts, owner, -1).to(torch.int32)
        rows = x.new_zeros(room, s.hidden).index_copy_(0, place, x[order // s.top_k])
        h, y = x.new_empty(room, 2 * s.intermediate), x.new_empty(room, s.hidden)
        product(rows, w1, h, owner)
        product(_gate(problem, h), w2, y, owner)
        back = torch.empty_like(order).scatter_(0, order, place)
        return torch.bmm(weights[:, None].to(x.dtype), y[back].view(problem.tokens, s.top_k, -1))[:, 0]

    return forward


def vllm(problem: Problem) -> Forward:
    from vllm.model_executor.layers.fused_moe import fused_experts

    _plain_form(problem, "vLLM (as called here)")
    p = problem.parameters
    return lambda x, ids, weights: fused_experts(
        x, p["gate_up_proj"].detach(), p["down_proj"].detach(), weights.float(), ids.to(torch.int32)
    )


def sglang(problem: Problem) -> Forward:
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe import fused_experts_impl

    _plain_form(problem, "SGLang (as called here)")
    p = problem.parameters
    return lambda x, ids, weights: fused_experts_impl(
        x, p["gate_up_proj"].detach(), p["down_proj"].detach(), weights.float(), ids.to(torch.int32)
    )


def triton_kernels(problem: Problem) -> Forward:
    """triton_kernels chooses experts itself: it is given logits from which it must choose the case's own."""
    from triton_kernels.matmul_ogs import matmul_ogs
    from triton_kernels.routing import routing

    _plain_form(problem, "triton_kernels (as called here)")
    s, p = problem.shape, problem.parameters
    w1, w2 = (p[n].detach().transpose(1, 2) for n in ("gate_up_proj", "down_proj"))

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        logits = torch.full((x.shape[0], s.experts), -1e4, device=x.device, dtype=x.dtype)
        logits.scatter_(1, ids.long(), weights.detach().log().to(x.dtype))
        route, gather, scatter = routing(logits, s.top_k)
        h = matmul_ogs(x, w1, None, route, gather_indx=gather)
        return matmul_ogs(_gate(problem, h), w2, None, route, scatter_indx=scatter, gammas=route.gate_scal)

    return forward


_HF = ("transformers",)
RIVALS: Mapping[str, Rival] = {
    "headgate": Rival(cpu.headgate, "headgate.kernels.grouped_ffn on the stored weights"),
    "torch": Rival(torch_grouped, "torch's grouped_mm between a hand-written sort and sum"),
    "hf-grouped": Rival(
        cpu.IMPLEMENTATIONS["grouped_mm"], "transformers: grouped_mm_experts_forward", _HF, graphs=False
    ),
    "hf-batched": Rival(cpu.IMPLEMENTATIONS["batched_mm"], "transformers: batched_mm", _HF, most_tokens=64),
    "hf-eager": Rival(cpu.eager, "transformers: the experts module's own loop", _HF, trains=False, graphs=False),
    "scattermoe": Rival(scattermoe, "ScatterMoE", ("scattermoe",)),
    "liger": Rival(liger, "Liger's fused MoE", ("liger_kernel.ops.fused_moe",), "liger-kernel", graphs=False),
    "sonicmoe": Rival(sonicmoe, "SonicMoE", ("sonicmoe",), "sonic-moe", fewest_tokens=65),
    "deepgemm": Rival(deep_gemm, "DeepGEMM's grouped products", ("deep_gemm",), "deep-gemm", trains=False),
    "vllm": Rival(vllm, "vLLM's fused MoE", ("vllm",), trains=False),
    "sglang": Rival(sglang, "SGLang's fused MoE", ("sglang",), trains=False),
    "triton_kernels": Rival(triton_kernels, "triton_kernels' matmul_ogs", ("triton_kernels",), trains=False),
}
