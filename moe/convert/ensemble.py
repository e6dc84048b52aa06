"""Whole models behind a router: trained apart on parts of the data, of any sizes, mixed when they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WHO = "Ensemble"


@dataclass(frozen=True)
class Mixed:
    """logits   log-probabilities of the mixture [B, S, V]
    weights  of the models [B, S, M] (or [B, M] from a router)
    loss     mean cross-entropy of the next tokens, where labels were given
    """

    logits: Tensor
    weights: Tensor
    loss: Tensor | None = None


class Posterior(nn.Module):
    """How likely each model's domain is, given the tokens so far, by Bayes: prior times what the model made of them. It
    has no parameter to train; `fit` estimates the prior.

    temperature  divides log-likelihoods: above 1 the weights are more even

    Source: Li et al., Branch-Train-Merge (2022), the domain posterior and its cached prior.
    """

    def __init__(self, models: int, temperature: float = 1.0) -> None:
        super().__init__()
        if models < 1:
            raise ValueError(f"Posterior: models must be at least 1, got {models}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"Posterior: temperature must be positive and finite, got {temperature}")
        self.temperature = temperature
        self.register_buffer("log_prior", torch.full((models,), 1.0 / models).log())

    def forward(self, token_logp: Tensor) -> Tensor:
        """log weights [B, S, M] for the token after each place, from log p of each token given those before it
        [B, S, M] (0 for the first, which no model foretold). A place sees the tokens up to itself, none after."""
        return (self.log_prior + token_logp.float().cumsum(1) / self.temperature).log_softmax(-1)  # type: ignore[operator]

    @torch.no_grad()
    def fit(self, ensemble: Ensemble, batches: Sequence[Tensor], decay: float = 0.3) -> None:
        """The prior: an average of the posteriors at the ends of sequences [B, S], the newest weighing `decay`."""
        for ids in batches:
            for row in ensemble(ids).weights[:, -1]:
                prior = self.log_prior.exp() * (1 - decay) + row * decay  # type: ignore[operator]
                self.log_prior.copy_((prior / prior.sum()).log())  # type: ignore[operator]


class LearnedRouter(nn.Module):
    """Says from features [B, D] which part of the data they belong to: logits [B, M], by one hidden layer (`hidden` 0:
    linear). `fit` trains it on the parts that the models were trained on.

    Source: McAllister et al., Decentralized Diffusion Models (2025): the router is a classifier of clusters.
    """

    def __init__(self, features: int, models: int, hidden: int = 64) -> None:
        super().__init__()
        layers = [nn.Linear(features, hidden), nn.SiLU()] if hidden else []
        self.net = nn.Sequential(*layers, nn.Linear(hidden or features, models))

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features)

    def fit(
        self, features: Tensor, parts: Tensor, *, steps: int = 300, batch: int = 256, lr: float = 1e-2, seed: int = 0
    ) -> list[float]:
        """Cross-entropy of `parts` [N] int64 given `features` [N, D], by Adam. Returns the losses."""
        last: Any = self.net[-1]
        models = last.out_features
        if len(features) != len(parts) or parts.dtype != torch.int64 or not len(parts):
            raise ValueError(
                f"LearnedRouter: parts must be int64, one for each of {len(features)} features, got {parts.dtype} "
                f"{list(parts.shape)}"
            )
        if not 0 <= int(parts.min()) <= int(parts.max()) < models:
            raise ValueError(f"LearnedRouter: parts must be in 0 .. {models - 1}, got up to {int(parts.max())}")
        draw, losses = torch.Generator().manual_seed(seed), []
        adam = torch.optim.Adam(self.parameters(), lr=lr)
        for _ in range(steps):
            rows = torch.randint(len(parts), (min(batch, len(parts)),), generator=draw)
            loss = F.cross_entropy(self(features[rows]), parts[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.item())
        return losses


class Ensemble(nn.Module):
    """Several whole models, of any architectures and sizes, behind a router.

    models  language models, called with ids [B, S] and answering with `.logits` [B, S, V] of one vocabulary; or, with
            mix="outputs", any that answer with tensors of one shape [B, ...]
    router  a Posterior: weights follow from what the models say of the tokens so far, all models run. Any other module:
            called with `features` (or else with what the models get), logits [B, M]; only models that a row chose run
    top_k   models of a row (of a place, with a Posterior), their weights renormalised; None: all
    mix     "probabilities": the mixture of the models' next-token distributions. "outputs": the weighted sum of what
            they answer, which for denoising models trained on parts of the data, weighted by how likely each part is,
            is the model of all of it

    Sources: Branch-Train-Merge (2022); HDEE (2025), experts of different sizes; Decentralized Diffusion Models (2025).

    >>> ensemble = headgate.moe.convert.Ensemble([law, code], headgate.moe.convert.Posterior(2))
    >>> ensemble(ids, labels=ids).loss
    """

    def __init__(
        self, models: Sequence[nn.Module], router: nn.Module, *, top_k: int | None = None, mix: str = "probabilities"
    ) -> None:
        super().__init__()
        if not models or not all(isinstance(model, nn.Module) for model in models):
            raise ValueError(f"{_WHO}: models must be modules, at least one, got {[type(m).__name__ for m in models]}")
        if mix not in ("probabilities", "outputs"):
            raise ValueError(f"{_WHO}: mix must be 'probabilities' or 'outputs', got {mix!r}")
        if top_k is not None and not 1 <= top_k <= len(models):
            raise ValueError(f"{_WHO}: top_k must be in 1 .. {len(models)}, got {top_k}")
        if isinstance(router, Posterior) and (mix == "outputs" or len(router.log_prior) != len(models)):  # type: ignore[arg-type]
            rule = f"for {len(models)} models that give probabilities"
            raise ValueError(f"{_WHO}: router must be {rule}, got a Posterior of {len(router.log_prior)}, mix={mix!r}")  # type: ignore[arg-type]
        sizes: set[Any] = {getattr(getattr(m, "config", None), "vocab_size", None) for m in models} - {None}
        if mix == "probabilities" and len(sizes) > 1:
            raise ValueError(f"{_WHO}: models must share a vocabulary, got sizes {sorted(sizes)}")
        self.models, self.router, self.mix = nn.ModuleList(models), router, mix
        self.top_k = len(models) if top_k is None else top_k

    def forward(self, x: Tensor, *args: Any, features: Tensor | None = None, labels: Tensor | None = None) -> Any:
        """A Mixed, or the mixed output [B, ...] with mix="outputs". x and args [B, ...] go to the models; `labels`
        [B, S]: token ids, -100 for none, shifted here."""
        if isinstance(self.router, Posterior):
            logp = torch.stack([self._logp(model, x, args) for model in self.models], 2)
            said = F.pad(
                logp[:, :-1].gather(3, x[:, 1:, None, None].expand(-1, -1, logp.shape[2], 1))[..., 0], (0, 0, 1, 0)
            )
            weights = self._kept(self.router(said))
            return self._mixed(torch.logsumexp(weights[..., None] + logp, 2), weights.exp(), labels)
        logits = self.router(x, *args) if features is None else self.router(features)
        if logits.shape != (len(x), len(self.models)):
            shape = f"[{len(x)}, {len(self.models)}]"
            raise ValueError(f"{_WHO}: router must give logits {shape}, got {list(logits.shape)}")
        weights = self._kept(logits.float().log_softmax(-1))
        if self.mix == "outputs":
            return self._sum(weights.exp(), lambda model, *rows: model(*rows), x, *args)
        return self._mixed(self._log_mixture(weights, x, *args), weights.exp(), labels)

    def _kept(self, log_weights: Tensor) -> Tensor:
        if self.top_k == len(self.models):
            return log_weights
        best = log_weights.topk(self.top_k, -1).indices
        kept = torch.full_like(log_weights, -torch.inf).scatter(-1, best, log_weights.gather(-1, best))
        return kept.log_softmax(-1)

    def _sum(self, weights: Tensor, call: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """sum over models of weight * answer, each model on the rows that chose it."""
        total: Tensor | None = None
        for m, model in enumerate(self.models):
            rows = (weights[:, m] > 0).nonzero().flatten()
            if not len(rows) and not (total is None and m == len(self.models) - 1):
                continue
            some = [t[rows] if isinstance(t, Tensor) and t.dim() else t for t in inputs]
            answer = call(model, *some)
            answer = answer * weights[rows, m].view(-1, *[1] * (answer.dim() - 1)).to(answer.dtype)
            if total is None:
                total = answer.new_zeros(len(weights), *answer.shape[1:])
            total = total.index_add(0, rows, answer)
        assert total is not None
        return total

    def _log_mixture(self, log_weights: Tensor, x: Tensor, *args: Any) -> Tensor:
        """log of sum over models of weight * p [B, S, V], each model on the rows that chose it. As logarithms: p of
        what a model thinks impossible is 0 in fp32, whose logarithm has no gradient."""
        total: Tensor | None = None
        for m, model in enumerate(self.models):
            rows = (log_weights[:, m] > -torch.inf).nonzero().flatten()
            if not len(rows) and not (total is None and m == len(self.models) - 1):
                continue
            x_m, *rest = (t[rows] if isinstance(t, Tensor) and t.dim() else t for t in (x, *args))
            logp = self._logp(model, x_m, rest) + log_weights[rows, m].view(-1, 1, 1)
            if total is None:
                total = logp.new_full((len(log_weights), *logp.shape[1:]), torch.finfo(logp.dtype).min)
            total = total.index_copy(0, rows, torch.logaddexp(total[rows], logp))
        assert total is not None
        return total

    @staticmethod
    def _logp(model: nn.Module, x: Tensor, args: Sequence[Any]) -> Tensor:
        found = model(x, *args)
        return (found if isinstance(found, Tensor) else found.logits).float().log_softmax(-1)

    @staticmethod
    def _mixed(logp: Tensor, weights: Tensor, labels: Tensor | None) -> Mixed:
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logp[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Mixed(logp, weights, loss)
