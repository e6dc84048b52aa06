"""The cases of the MoE benchmark: five models' expert layers, scaled to fit, and the tensors of one case."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..kernels import GPT_OSS, Activation, Routing
from ..kernels.activation import as_activation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "train")


@dataclass(frozen=True)
class Shape:
    """One model's expert layer: D `hidden`, F `intermediate`, E `experts`, K `top_k`, and how its weights are stored.

    `experts_class` is "module:class:config" inside transformers, `scaling` says what was changed from the model.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    experts_class: str
    scaling: str
    activation: str = "silu"
    transposed: bool = False  # [E, in, out] in place of [E, out, in]
    interleaved: bool = False  # gate, up, gate, up, ...
    bias: bool = False

    @property
    def form(self) -> Activation:
        return GPT_OSS if self.activation == "gpt_oss" else as_activation(self.activation)

    @property
    def expert_elements(self) -> int:
        """Weights of one expert, biases aside."""
        return 3 * self.hidden * self.intermediate

    def sizes(self) -> dict[str, int]:
        return {"D": self.hidden, "F": self.intermediate, "E": self.experts, "K": self.top_k}


_MIXTRAL = "mixtral:MixtralExperts:MixtralConfig"
_QWEN3 = "qwen3_moe:Qwen3MoeExperts:Qwen3MoeConfig"
_OLMOE = "olmoe:OlmoeExperts:OlmoeConfig"
_GPT_OSS = "gpt_oss:GptOssExperts:GptOssConfig"
_DEEPSEEK = "deepseek_v3:DeepseekV3Experts:DeepseekV3Config"

UNSCALED = {
    s.name: s
    for s in (
        Shape("mixtral", 4096, 14336, 8, 2, _MIXTRAL, "Mixtral-8x7B as it is"),
        Shape("qwen3", 2048, 768, 128, 8, _QWEN3, "Qwen3-30B-A3B as it is"),
        Shape("olmoe", 2048, 1024, 64, 8, _OLMOE, "OLMoE-1B-7B as it is"),
        Shape("gpt-oss", 2880, 2880, 32, 4, _GPT_OSS, "gpt-oss-20b as it is", "gpt_oss", True, True, bias=True),
        Shape("deepseek", 7168, 2048, 256, 8, _DEEPSEEK, "DeepSeek-V3 as it is"),
    )
}
SHAPES = {
    s.name: s
    for s in (
        replace(UNSCALED["mixtral"], hidden=1024, intermediate=3584, scaling="Mixtral-8x7B, D and F divided by 4"),
        replace(
            UNSCALED["qwen3"],
            hidden=1024,
            intermediate=512,
            experts=64,
            scaling="Qwen3-30B-A3B, D and E halved, F 768 -> 512",
        ),
        replace(UNSCALED["olmoe"], experts=32, top_k=4, scaling="OLMoE-1B-7B, D and F kept, E and K halved"),
        replace(
            UNSCALED["gpt-oss"],
            hidden=1024,
            intermediate=1024,
            scaling="gpt-oss-20b, D and F 2880 -> 1024, E and K kept",
        ),
        replace(
            UNSCALED["deepseek"],
            hidden=1024,
            intermediate=288,
            scaling="DeepSeek-V3, D and F divided by 7, E and K kept",
        ),
    )
}


@dataclass(frozen=True)
class Case:
    """What one block of the output measures. `tokens` T, `dtype` a key of DTYPES, `kind` one of PASSES."""

    shape: Shape
    tokens: int
    dtype: str
    kind: str

    def __str__(self) -> str:
        s = self.shape
        sizes = f"D {s.hidden}, F {s.intermediate}, E {s.experts}, K {s.top_k}"
        return f"{s.name} ({sizes})  T {self.tokens}  {self.dtype}  {self.kind}"


@dataclass
class Problem:
    """The tensors that every implementation of one case is given, the same ones.

    x [T, D]; routings: list of (ids int64 [T, K], weights [T, K]), one per call; w1, w2 and biases as the model stores
    them; grad [T, D], a dense cotangent (an expanded one, as from sum(), is refused by torch's grouped matmul).
    """

    shape: Shape
    tokens: int
    x: Tensor
    grad: Tensor
    routings: list[tuple[Tensor, Tensor]]
    parameters: dict[str, nn.Parameter] = field(repr=False)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *(w for _, w in self.routings), *self.parameters.values()]

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def counts(self, call: int) -> list[int]:
        """Rows per expert of one call."""
        return torch.bincount(self.routings[call][0].flatten(), minlength=self.shape.experts).tolist()

    def bytes_hit(self) -> float:
        """Bytes of the weights of the experts hit by one call, averaged over the calls."""
        hit = sum(sum(c > 0 for c in self.counts(i)) for i in range(len(self.routings)))
        return hit / len(self.routings) * self.shape.expert_elements * self.x.element_size()

    def bytes_kept(self) -> int:
        """What the house keeps for backward: rows, pre-activation of every pair, ids (int32) and weights."""
        s, pairs = self.shape, self.tokens * self.shape.top_k
        return (self.tokens * s.hidden + pairs * 2 * s.intermediate + pairs) * self.x.element_size() + 4 * pairs


def make_parameters(shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, nn.Parameter]:
    """Random expert weights under the names transformers gives them, scaled so that activations stay near one."""
    rng = torch.Generator(device=device).manual_seed(seed)
    d, f, e = shape.hidden, shape.intermediate, shape.experts
    sizes: dict[str, tuple[int, ...]] = {"gate_up_proj": (e, 2 * f, d), "down_proj": (e, d, f)}
    if shape.transposed:
        sizes = {"gate_up_proj": (e, d, 2 * f), "down_proj": (e, f, d)}
    scales = {"gate_up_proj": d**-0.5, "down_proj": f**-0.5}
    if shape.bias:
        sizes |= {"gate_up_proj_bias": (e, 2 * f), "down_proj_bias": (e, d)}
    made = {}
    for name, size in sizes.items():
        w = torch.empty(size, dtype=dtype, device=device).normal_(0, scales.get(name, 0.1), generator=rng)
        made[name] = nn.Parameter(w)
    return made


def _choose(shape: Shape, tokens: int, rng: torch.Generator) -> Tensor:
    """Expert ids [T, K] with mild skew: Gumbel top-k under log-popularities of standard deviation 0.5."""
    popularity = 0.5 * torch.randn(shape.experts, generator=rng)
    gumbel = -torch.log(-torch.log(torch.rand(tokens, shape.experts, generator=rng).clamp_(1e-9, 1 - 1e-7)))
    return (popularity + gumbel).topk(shape.top_k, dim=1).indices


def make_problem(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    parameters: dict[str, nn.Parameter],
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """The case's inputs. One token alone gets E // K calls with disjoint experts, as consecutive layers of a model have
    other weights: a repeated call would find its experts in the cache, which decoding never does."""
    rng = torch.Generator().manual_seed(seed + 1)
    if tokens == 1:
        dealt = torch.randperm(shape.experts, generator=rng)
        chosen = [dealt[i : i + shape.top_k][None] for i in range(0, shape.experts - shape.top_k + 1, shape.top_k)]
    else:
        chosen = [_choose(shape, tokens, rng)]
    routings = []
    for ids in chosen:
        weights = torch.rand(ids.shape, generator=rng) + 0.1
        weights = (weights / weights.sum(1, keepdim=True)).to(device, dtype).requires_grad_()
        routings.append((ids.to(device), weights))
    x = torch.randn(tokens, shape.hidden, generator=rng).to(device, dtype).requires_grad_()
    grad = torch.randn(tokens, shape.hidden, generator=rng).to(device, dtype)
    return Problem(shape, tokens, x, grad, routings, parameters)


def as_routing(shape: Shape, ids: Tensor, weights: Tensor) -> Routing:
    return Routing.from_topk(ids, weights, shape.experts)
