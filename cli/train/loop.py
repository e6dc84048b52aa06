"""The steps of a training under a fold, and its checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from ...bench.corpus import Corpus
from ...bench.olmoe import CLIP, learning_rate
from ...bench.screen import Screen
from ...dispatch import Fold
from ...moe.ranks.checkpoint import load_checkpoint, save_checkpoint
from ...moe.ranks.parallel import clip_grad_norm_, no_sync
from .model import Stage, cut, entropy
from .options import Options
from .ranks import together

LAST = "last"  # the folder's name inside --checkpoint


class Trainer:
    """A stage, its optimizer and its batches. `step` counts the optimizer steps made, over all runs."""

    def __init__(self, options: Options, fold: Fold, stage: Stage, corpus: Corpus, device: torch.device) -> None:
        self.options, self.fold, self.stage, self.device = options, fold, stage, device
        named = list(stage.named_parameters())
        # What tp makes DTensors and what it leaves: torch's fused and foreach forms take no mixture.
        groups = [[p for n, p in named if ("self_attn" in n) == attention] for attention in (True, False)]
        kinds = [{"params": group} for group in groups]
        self.adam = torch.optim.AdamW(kinds, lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self.step, self.corpus = 0, corpus
        self.targets = options.batch * (options.shape.length - 1)  # of the whole batch
        self.schedule = self._pipeline() if fold.size("pp") > 1 else None

    def _pipeline(self) -> ScheduleGPipe:
        f, options, shape = self.fold, self.options, self.options.shape
        rows, length = options.batch // f.size("dp") // options.parts, shape.length // f.size("cp", "tp")
        ids = torch.zeros(rows, length, dtype=torch.int64, device=self.device)
        hidden = torch.zeros(rows, length, shape.hidden, device=self.device, requires_grad=True)
        logits = torch.zeros(rows, length, self.stage.config.vocab_size, device=self.device, requires_grad=True)
        stage = PipelineStage(
            self.stage, f.stage, f.size("pp"), self.device, group=f.group("pp"),
            input_args=ids if self.stage.first else hidden, output_args=logits if self.stage.last else hidden,
        )  # fmt: skip
        return ScheduleGPipe(stage, options.parts, loss_fn=self._loss, scale_grads=False)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """This rank's part of the mean over the whole batch; gradients are summed over tp and averaged over dp * cp."""
        return entropy(logits, targets) * (self.fold.size("dp", "cp") / self.targets)

    def _passes(self, ids: Tensor, targets: Tensor) -> list[Tensor]:
        """Forward and backward of all micro-batches; their losses, on the ranks of the last stage."""
        losses: list[Tensor] = []
        if self.schedule is not None:
            inputs, wanted = (ids,) if self.stage.first else (), targets if self.stage.last else None
            self.schedule.step(*inputs, target=wanted, losses=losses if self.stage.last else None)
            return losses
        parts = list(zip(ids.chunk(self.options.parts), targets.chunk(self.options.parts), strict=True))
        for at, (x, wanted) in enumerate(parts, 1):
            with contextlib.nullcontext() if at == len(parts) else no_sync(self.stage):
                loss = self._loss(self.stage(x), wanted)
                loss.backward()
            losses.append(loss)
        return losses

    def one_step(self, batch: Tensor) -> tuple[float, float]:
        """(mean cross-entropy of the whole batch in nats per byte, norm of the gradients): the same on every rank."""
        ids, targets = (t.to(self.device) for t in cut(batch, self.fold, self.options.parts))
        self.adam.zero_grad()
        total = torch.zeros((), device=self.device)
        for loss in self._passes(ids, targets):
            total += loss.detach() / self.fold.size("dp", "cp")
        dist.all_reduce(total)
        norm = clip_grad_norm_(self.stage, CLIP)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(self.step / self.options.steps, self.options.learning_rate)
        self.adam.step()
        self.step += 1
        return float(total), float(norm)

    def train(self, screen: Screen) -> dict[str, list[float]]:
        """Runs the steps that are left; what each gave."""
        options = self.options
        found: dict[str, list[float]] = {"loss": [], "grad_norm": [], "tokens_per_s": []}
        batches = self.corpus.batches(options.batch, options.shape.length, options.seed)
        for _ in range(self.step):  # those of the runs before
            next(batches)
        while self.step < options.steps:
            start = time.perf_counter()
            loss, norm = self.one_step(next(batches))
            rate = options.batch * options.shape.length / (time.perf_counter() - start)
            if not math.isfinite(loss + norm):
                raise RuntimeError(f"train: diverged at step {self.step}; try another --seed or a smaller --lr")
            for name, value in (("loss", loss), ("grad_norm", norm), ("tokens_per_s", rate)):
                found[name].append(value)
            bits = loss / math.log(2)
            screen.say(
                f"step {self.step}/{options.steps}  loss {loss:.4f}  {bits:.2f} bits/byte  "
                f"grad norm {norm:.3f}  {rate:,.0f} tokens/s"
            )
            if options.every and self.step % options.every == 0 and self.step < options.steps:
                self.save()
        if found["loss"]:
            self.save()
        return found

    def _data(self) -> dict[str, Any]:
        o = self.options
        return {"seed": o.seed, "batch": o.batch, "length": o.shape.length, "text": self.corpus.source}

    def save(self) -> None:
        if self.options.checkpoint is not None:
            extra = {"step": self.step, "data": self._data()}
            save_checkpoint(self.options.checkpoint / LAST, self.stage, self.adam, extra=extra)

    def resume(self) -> bool:
        """Goes on from the checkpoint, where there is one. Raises ValueError where it is of another training."""
        folder = self.options.checkpoint
        seen: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(seen, folder is not None and is_there(folder))
        if not any(seen) or folder is None:
            return False
        if not all(seen):
            blind = ", ".join(str(rank) for rank, there in enumerate(seen) if not there)
            raise ValueError(
                f"train: --checkpoint must be a folder that all ranks share, got one not seen by rank {blind}"
            )
        extra = together(lambda: load_checkpoint(folder / LAST, self.stage, self.adam))
        if extra["data"] != self._data():
            odd = next(name for name, value in self._data().items() if value != extra["data"][name])
            raise ValueError(
                f"train: --checkpoint must be of the same training, got one with {odd} {extra['data'][odd]} "
                f"instead of {self._data()[odd]} in {folder}"
            )
        self.step = extra["step"]
        return True


def is_there(folder: Path) -> bool:
    """Whether a checkpoint is in `folder`, or one whose replacement was cut short."""
    return any((folder / name / ".metadata").exists() for name in (LAST, f"{LAST}.old"))
