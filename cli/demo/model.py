"""The model: transformers' OLMoE at a small size, on bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bench.corpus import VOCABULARY
from ...bench.olmoe import Model
from ...kernels.routing import Routing
from ...moe.hf import replace, restore
from ...moe.losses import load_balancing_loss

RIVALS = ("eager", "grouped_mm")  # transformers' implementations; its batched_mm copies each token's experts: too much
BALANCE = 0.02  # the weight of the load-balancing loss


def tokenizer():
    """A transformers tokenizer whose ids are the bytes, so that the saved folder is whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    bytewise = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(VOCABULARY)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, clean_up_tokenization_spaces=False)


def parameters(model: Model) -> tuple[int, int]:
    """Parameters in all, and those that one token meets."""
    config = model.config
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return total, total - experts + experts * config.num_experts_per_tok // config.num_experts


@contextmanager
def implementation(model: Model, name: str) -> Iterator[None]:
    """Runs the experts of an unswapped model by transformers' `name`, or by Headgate's swap for "headgate"."""
    if name == "headgate":
        replace(model)
        try:
            yield
        finally:
            restore(model)
    else:
        before = model.config._experts_implementation
        model.set_experts_implementation(name)
        try:
            yield
        finally:
            model.set_experts_implementation(before)


def losses(model: Model, batch: Tensor) -> tuple[Tensor, Tensor]:
    """(what is minimised, the cross-entropy in nats per byte, detached).

    The balancing loss is taken layer by layer: transformers' own pools the layers, which lets each leave half of its
    experts idle as long as the others use them.
    """
    out = model.model(input_ids=batch, output_router_logits=True)
    entropy = _entropy(model, out.last_hidden_state, batch)
    balance = torch.stack([_balance(logits, model.config.num_experts_per_tok) for logits in out.router_logits])
    return entropy + BALANCE * balance.mean(), entropy.detach()


def _entropy(model: Model, hidden: Tensor, batch: Tensor) -> Tensor:
    logits = model.lm_head(hidden)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def _balance(logits: Tensor, top_k: int) -> Tensor:
    scores = logits.float().softmax(-1)
    weights, ids = scores.topk(top_k)
    return load_balancing_loss(Routing(ids.int(), weights, scores.shape[1], scores=scores))


@torch.no_grad()
def cross_entropy(model: Model, batches: list[Tensor]) -> float:
    """Mean nats per byte over batches; the model's training mode is kept."""
    training = model.training
    model.eval()
    total = sum(float(_entropy(model, model.model(input_ids=b).last_hidden_state, b)) * len(b) for b in batches)
    model.train(training)
    return total / sum(map(len, batches))


@torch.no_grad()
def generate(model: Model, prompt: bytes, count: int, seed: int, temperature: float = 0.7) -> bytes:
    """`count` bytes after the prompt, by transformers' own generate."""
    training = model.training
    model.eval()
    ids = torch.tensor([list(prompt)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=0 if temperature > 0 else None,
            pad_token_id=0,
            use_cache=True,
        )
    model.train(training)
    return bytes(out[0].tolist())


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' advice and its progress bars do not concern the reader of a demo."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
