"""Answers of one model: one after another by `generate`, or several together by transformers' continuous batching."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.cli.serving.utils import BaseGenerateManager, InferenceThread, _StreamError
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from ..generate import COLDEST
from .answer import FAILED, Answer, Gone
from .bodies import Refused, Wanted

PAGE, STEP = 64, 1024  # tokens of a page of the cache, and of one call of the model at most
DEFAULT_NEW = 1024
_NONE = -1  # an end token that never comes


Failed = Callable[[Exception], object]


def _raised(error: Exception) -> None:
    raise error


class Manager(BaseGenerateManager):
    """What transformers' handlers call to generate. `at_once`: answers under way at a time; `context`: tokens of a
    prompt and its answer."""

    at_once = 1

    def __init__(self, model: Any, context: int) -> None:
        self.model, self.context = model, context
        self._wanted: dict[str, Wanted] = {}
        self._answers: dict[str, Answer] = {}

    @contextmanager
    def request(self, name: str, wanted: Wanted) -> Iterator[None]:
        """A request, for the length of a `with`: what is not done at its end is given up."""
        self._wanted[name] = wanted
        try:
            yield
        finally:
            del self._wanted[name]
            if (answer := self._answers.pop(name, None)) is not None:
                answer.cancel()

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        """(queue, what counts and cancels), as the handlers want it. Raises Refused where the prompt is too long."""
        wanted, ids = self._wanted[request_id], inputs["input_ids"]
        room = self.context - ids.shape[-1]
        if not ids.shape[-1]:
            raise Refused(400, "the prompt must have a token, got none")
        if room < (wanted.tokens or 1):
            asked = f" and an answer of {wanted.tokens:,}" if wanted.tokens else ""
            raise Refused(
                400,
                f"the prompt and its answer must have at most {self.context:,} tokens, got a prompt of "
                f"{ids.shape[-1]:,}{asked}",
                "context_length_exceeded",
            )
        words = self.model.config.get_text_config().vocab_size
        if wanted.bias and max(wanted.bias) >= words:
            rule = f"logit_bias must be of tokens below {words:,}, got {max(wanted.bias)}"
            raise Refused(400, rule, "invalid_value")
        gen_config.max_new_tokens = wanted.tokens or min(DEFAULT_NEW, room)  # the handler compares with it
        config = sampling(gen_config, wanted)
        answer = Answer(processor._tokenizer, wanted.stop, response_parser, lambda: self.give_up(request_id))
        self._answers[request_id] = answer
        self.begin(request_id, inputs, config, wanted.seed, answer)
        return answer.queue, answer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        """(text, tokens of the prompt, ids), as the handlers want it."""
        queue, answer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        while (item := await queue.get()) is not None:
            if isinstance(item, _StreamError):
                raise Refused(500, FAILED)
        return answer.text, inputs["input_ids"].shape[-1], answer.tokens

    def begin(self, name: str, inputs: Any, config: GenerationConfig, seed: int | None, answer: Answer) -> None:
        """Starts an answer; a thread goes on with it."""
        raise NotImplementedError

    def give_up(self, name: str) -> None:
        """The client is gone."""

    def alive(self) -> bool:
        return True


class InTurn(Manager):
    """One `generate` after another, in a thread of its own."""

    def __init__(self, model: Any, context: int) -> None:
        super().__init__(model, context)
        self._thread = InferenceThread()

    def begin(self, name, inputs, config, seed, answer):
        def work() -> None:
            if answer.gone:
                return
            try:
                if seed is not None:
                    torch.manual_seed(seed)
                self.model.generate(**inputs, generation_config=config, streamer=answer)
            except Gone:
                answer.end()
            except Exception as error:
                answer.fail(error)

        self._thread.submit(work)

    def stop(self) -> None:
        """Gives up all answers, and waits for the thread to have left the model."""
        for answer in self._answers.values():
            answer.leave()
        self._thread.submit(lambda: None).result()


class Together(Manager):
    """Up to `at_once` answers in each call of the model: an expert that several need is fetched and read once."""

    def __init__(self, model: Any, context: int, at_once: int) -> None:
        super().__init__(model, context)
        self.at_once = at_once
        self._batching: Any = None
        self._started()

    def _started(self) -> Any:
        """transformers' manager, a new one where the last has died of an error."""
        if self._batching is not None and self.alive():
            return self._batching
        self.stop()
        pages = self.at_once * math.ceil((self.context + 1) / PAGE)
        config = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=pages, max_batch_tokens=max(STEP, self.at_once),
            max_requests_per_batch=self.at_once, max_memory_percent=0.95, use_cuda_graph=False,
            use_async_batching=False, auto_switch_to_flash=False,
        )  # fmt: skip
        plain = GenerationConfig(do_sample=True, eos_token_id=_NONE)
        found = self.model.init_continuous_batching(generation_config=plain, continuous_batching_config=config)
        found.logit_processor.logits_processor = LogitsProcessorList([Choice()])
        found.logit_processor.tensors_required = 1
        found.logit_processor.supported_keys = Choice.supported_kwargs
        found.logit_processor.do_processing = True
        found.start()
        self._batching = found
        return found

    def warm_up(self) -> None:
        """Two tokens. Raises RuntimeError where the model cannot be batched so."""
        config = sampling(self.model.generation_config, Wanted(2, 0.0, None, None, ()))
        self._batching.add_request(
            [0, 0], max_new_tokens=2, eos_token_id=_NONE, choose=self._choose(config, None, 2, _raised)
        )
        while (found := self._batching.get_result(timeout=1)) is None:
            if not self._batching.is_running() or not self.alive():
                raise RuntimeError(str(self._batching.background_thread_status.fatal_error))
        if found.error is not None:
            raise RuntimeError(found.error)

    def begin(self, name, inputs, config, seed, answer):
        batching = self._started()

        def came(output: Any) -> None:
            goes_on = answer.add(output.generated_tokens[answer.total_tokens :])
            if output.error is not None:
                answer.fail(output.error)
            elif output.is_finished():
                answer.end()
            elif not goes_on:
                self.give_up(name)
                answer.end()

        batching.register_result_handler(name, came)
        ids = inputs["input_ids"][0].tolist()
        taken = batching.add_request(
            ids, request_id=name, max_new_tokens=config.max_new_tokens, streaming=True,
            eos_token_id=_NONE if config.eos_token_id is None else config.eos_token_id,
            choose=self._choose(config, seed, len(ids), answer.fail),
        )  # fmt: skip
        if taken is None:
            answer.fail("continuous batching has ended")

    def _choose(self, config: GenerationConfig, seed: int | None, length: int, failed: Failed) -> Chooser:
        device = self.model.device
        processors = self.model._get_logits_processor(config, input_ids_seq_length=length, device=device)
        return Chooser(processors, config.do_sample, seed, device, failed)

    def give_up(self, name: str) -> None:
        self._batching.cancel_request(name)
        router = self._batching.output_router
        with router._lock:  # a request that is cancelled never ends, and its handler would stay
            router.result_handlers.pop(name, None)

    def alive(self) -> bool:
        return self._batching.background_thread_status.fatal_error is None

    def stop(self) -> None:
        if self._batching is not None:
            self._batching.stop(block=True, hard_stop=True)


class Chooser:
    """How one answer chooses its tokens: by processors of its own, and its own random numbers. `failed` is told what
    goes wrong, so that it ends this answer and none of the others."""

    def __init__(self, processors: Any, sample: bool, seed: int | None, device: torch.device, failed: Failed) -> None:
        self.processors, self.sample, self.failed = processors, sample, failed
        self.random = torch.Generator(device)
        if seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(seed)

    def __call__(self, ids: list[int], scores: Tensor) -> Tensor:
        """int64 [1], of scores [V]."""
        scores = scores[None].float()
        if self.processors:
            scores = self.processors(torch.tensor([ids], device=scores.device), scores)
        if not self.sample:
            return scores[0].argmax()[None]
        return torch.multinomial(scores[0].softmax(-1), 1, generator=self.random)


class Choice(ContinuousBatchingLogitsProcessor):
    """Leaves each row the one token that its request chooses: transformers has one way to choose for all of a batch."""

    supported_kwargs = {"choose": Chooser}  # noqa: RUF012
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._states: list[Any] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        self._states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        out = torch.full_like(scores, -math.inf)
        for row, state in enumerate(self._states):
            choose = state.logit_processor_kwargs["choose"]
            try:
                token = choose([*state.initial_tokens, *state.generated_tokens], scores[row])
            except Exception as error:
                choose.failed(error)
                token = 0
            out[row, token] = 0.0
        return out


def sampling(config: GenerationConfig, wanted: Wanted) -> GenerationConfig:
    """A copy with what a request wants. Temperature 0: the likeliest token, always."""
    config = copy.deepcopy(config)
    config.stop_strings = config.max_length = None
    config.temperature, config.top_p = wanted.temperature or config.temperature, wanted.top_p or config.top_p
    if wanted.temperature is not None:
        config.do_sample = wanted.temperature >= COLDEST
    elif wanted.top_p is not None:
        config.do_sample = True
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    if wanted.bias:
        config.sequence_bias = {(token,): bias for token, bias in wanted.bias.items()}
    if config.pad_token_id is None:
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends or 0
    return config


async def until(task: asyncio.Task, gone: asyncio.Task) -> Any:
    """What a task gives, or None where `gone` ended first; then the task is cancelled and has ended."""
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        gone.cancel()
        return task.result()
    task.cancel()
    await asyncio.wait({task})
    return None
