"""`headgate generate MODEL`: answers of a model that may be larger than memory, as text, as JSON, or in a chat."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bench.arguments import input_file, number, positive, seed
from ..bench.screen import Screen
from . import loading

MOST_TEXT = 1 << 24  # characters of prompts
NEW = 512  # tokens of an answer, where nobody says
COLDEST = 1e-4  # a lower temperature divides scores to infinity: it is taken as 0, which is its limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate generate`."""
    add = parser.add_argument
    loading.add_arguments(parser)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--prompt", metavar="TEXT", help="what to answer (default: standard input, if it is no terminal)"
    )
    kinds.add_argument("--chat", action="store_true", help="a conversation: one line is one message, Ctrl-D ends it")
    kinds.add_argument("--file", type=input_file, metavar="FILE", help="a text file with a prompt in each line")
    add("--batch", type=positive, default=1, metavar="N", help="with --file: prompts answered together (default 1)")
    add("--raw", action="store_true", help="continue the prompt as it is, without the model's chat template")
    add("--system", metavar="TEXT", help="the system message, for the chat template")
    add("--max-new-tokens", type=positive, metavar="N", help=f"the longest answer (default {NEW}, or what fits)")
    add(
        "--temperature",
        type=_temperature,
        metavar="X",
        help="0, or below 0.0001: always the likeliest token (default: as the model)",
    )
    add(
        "--top-p",
        type=_share,
        metavar="X",
        help="sample from the likeliest of this share (default: as the model)",
    )
    add("--seed", type=seed, metavar="N", help="where sampling begins")
    add("--stats", action="store_true", help="end with hit rate, bytes read, tokens/s, first token, memory")
    add("--json", action="store_true", help="one JSON object for each prompt")


def run(args: argparse.Namespace) -> int:
    """Prints the answers; 0."""
    loading.check_extras("generate")
    if args.json and args.chat:
        raise ValueError("generate: --json must come with prompts, got --chat")
    if args.raw and (args.chat or args.system is not None):
        raise ValueError(f"generate: --raw must be without {'--chat' if args.chat else '--system'}")
    if args.batch > 1 and args.file is None:
        raise ValueError(f"generate: --batch must come with --file, got {args.batch}")
    loading.begin(args)
    tokenizer = loading.tokenizer_of(args.model, "generate", args.config)
    if (args.chat or args.system is not None) and tokenizer.chat_template is None:
        which = "--chat" if args.chat else "--system"
        raise ValueError(f"generate: {which} must have a model with a chat template, got none in {args.model}")
    prompts = [] if args.chat else _prompts(args)
    out = Screen()
    with loading.opened(args, tokenizer) as loaded:
        job = Job(loaded, args, out)
        if args.chat:
            job.chat()
        elif args.batch > 1:
            job.together(prompts)
        else:
            job.in_turn(prompts)
        if args.stats:
            screen = Screen(sys.stderr)
            for name, value in job.rows():
                screen.say(f"{name:<16} {value}")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        found, where = [args.prompt], "--prompt"
    elif args.file is not None:
        found, where = [line for line in _read(args.file).splitlines() if line.strip()], f"--file {args.file}"
    elif sys.stdin is None or sys.stdin.isatty():
        raise ValueError("generate: --prompt, --file or --chat must be given, or a prompt on standard input")
    else:
        found, where = [_bounded(sys.stdin, "standard input").strip("\n")], "standard input"
    if not found or not found[0].strip():
        raise ValueError(f"generate: {where} must have a prompt, got nothing")
    return found


def _read(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return _bounded(file, f"--file {path}")


def _bounded(file: Any, name: str) -> str:
    text = file.read(MOST_TEXT + 1)
    if len(text) > MOST_TEXT:
        raise ValueError(f"generate: {name} must have at most {MOST_TEXT:,} characters, got more")
    return text


@dataclass
class Answer:
    """`ids` int64 [new] on the CPU; seconds to the first token and to the last; `cache`: keys and values of all tokens
    but the last."""

    ids: list[int] = field(default_factory=list)
    first_s: float = 0.0
    whole_s: float = 0.0
    cache: Any = None

    def figures(self) -> dict[str, float | None]:
        later, took = len(self.ids) - 1, self.whole_s - self.first_s
        return {"first_token_s": self.first_s, "tokens_per_s": later / took if later > 0 and took > 0 else None}


class Job:
    """The answers of one command, and what they took."""

    def __init__(self, loaded: loading.Loaded, args: argparse.Namespace, out: Screen) -> None:
        self.loaded, self.args, self.out = loaded, args, out
        self.config = generation_of(loaded, args)
        self.prompt_tokens = self.new_tokens = 0
        self.first_s: list[float] = []
        self.later, self.later_s = 0, 0.0
        if args.seed is not None:
            import torch

            torch.manual_seed(args.seed)

    def chat(self) -> None:
        """Reads a line, answers it, and so on. Ctrl-C ends an answer; at the prompt it ends the chat."""
        said = [] if self.args.system is None else [{"role": "system", "content": self.args.system}]
        before: list[int] = []
        cache = None
        while (line := self._line()) is not None:
            if not line.strip():
                continue
            said.append({"role": "user", "content": line})
            ids = self._templated(said)
            if ids[: len(before)] != before:  # the template has changed what was there
                cache = None
            pieces: list[str] = []
            with closing(self.answer(ids, answer := Answer(cache=cache))) as stream:
                try:
                    for piece in stream:
                        pieces.append(piece)
                        self.out.piece(piece)
                except KeyboardInterrupt:
                    if not sys.stdin.isatty():
                        raise
            self.out.piece("\n")
            said.append({"role": "assistant", "content": "".join(pieces)})
            before, cache = [*ids, *answer.ids[:-1]], answer.cache

    def _line(self) -> str | None:
        """The next message, None at the end."""
        try:
            if sys.stdin.isatty():
                return input("> ")
            line = sys.stdin.readline(MOST_TEXT)
        except EOFError:
            return None
        return line.rstrip("\n") if line else None

    def in_turn(self, prompts: list[str]) -> None:
        for prompt in prompts:
            ids = self.ids_of(prompt)
            before = self.loaded.offloaded.stats()
            if not self.args.json:
                if len(prompts) > 1:
                    self.out.piece(f"> {prompt}\n")
                with closing(self.answer(ids, Answer())) as stream:
                    for piece in stream:
                        self.out.piece(piece)
                self.out.piece("\n\n" if len(prompts) > 1 else "\n")
                continue
            with closing(self.answer(ids, answer := Answer())) as stream:
                text = "".join(stream)
            self._object(prompt, text, len(ids), answer.ids, answer.figures() | self._since(before))

    def together(self, prompts: list[str]) -> None:
        """`--batch` prompts at once: every layer's experts are fetched once for all of them."""
        from ..moe.offload.batching import generate_offline

        model, tokenizer, most = self.loaded.model, self.loaded.tokenizer, self.args.batch
        tokens = [self.ids_of(prompt) for prompt in prompts]
        longest = max(map(len, tokens))
        for begin in range(0, len(prompts), most):
            some, before, began = tokens[begin : begin + most], self.loaded.offloaded.stats(), time.perf_counter()
            made, stop = list[Any](), threading.Event()
            told = {"generation_config": self._config(longest), "stopping_criteria": stopping(stop)}
            with beside(lambda: made.extend(generate_offline(model, some, micro_batch=most, **told)), stop):  # noqa: B023
                pass  # it is over before the names change
            took = time.perf_counter() - began
            self.later, self.later_s = self.later + sum(map(len, made)), self.later_s + took
            self.prompt_tokens += sum(map(len, some))
            self.new_tokens += sum(map(len, made))
            since = {"batch_s": took} | self._since(before)
            for prompt, ids, new in zip(prompts[begin : begin + most], some, made, strict=True):
                text = tokenizer.decode(new, skip_special_tokens=True)
                if self.args.json:
                    self._object(prompt, text, len(ids), new.tolist(), since)
                else:
                    self.out.piece(f"> {prompt}\n{text}\n\n")

    def ids_of(self, prompt: str) -> list[int]:
        """Tokens of a prompt, as a message of the user's where the model has a chat template."""
        tokenizer = self.loaded.tokenizer
        if self.args.raw or tokenizer.chat_template is None:
            ids = tokenizer(prompt)["input_ids"]
        else:
            system = [] if self.args.system is None else [{"role": "system", "content": self.args.system}]
            ids = self._templated([*system, {"role": "user", "content": prompt}])
        if not ids:
            raise ValueError(f"generate: a prompt must have a token, got none in {prompt!r}")
        return ids

    def _templated(self, said: list[dict[str, str]]) -> list[int]:
        found = self.loaded.tokenizer.apply_chat_template(
            said, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(found["input_ids"])

    def _config(self, length: int) -> Any:
        """What `generate` is told for a prompt of this length. Raises ValueError where the model cannot see so much."""
        from copy import deepcopy

        config, most = deepcopy(self.config), self.loaded.longest
        asked = self.args.max_new_tokens
        if most is not None and length + (asked or 1) > most:
            raise ValueError(
                f"generate: a prompt and its answer must have at most {most:,} tokens for this model, got a prompt of "
                f"{length:,}" + (f" and --max-new-tokens {asked}" if asked else "")
            )
        config.max_new_tokens = asked or (NEW if most is None else min(NEW, most - length))
        return config

    def answer(self, ids: list[int], answer: Answer) -> Generator[str, None, None]:
        """Pieces of text as they are made, by a thread of its own: a signal ends the answer at its next token, never
        amid a step of the model."""
        import torch
        from transformers import TextIteratorStreamer

        stop, began = threading.Event(), time.perf_counter()

        class Pieces(TextIteratorStreamer):
            def put(self, value):
                if not self.next_tokens_are_prompt:
                    answer.whole_s = time.perf_counter() - began
                    answer.first_s = answer.first_s or answer.whole_s
                    answer.ids += value.reshape(-1).tolist()
                super().put(value)

        config, pieces = (
            self._config(len(ids)),
            Pieces(self.loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        config.return_dict_in_generate = True
        given = torch.tensor([ids], device=self.loaded.model.device)

        def work() -> None:
            try:
                out = self.loaded.model.generate(
                    given, attention_mask=torch.ones_like(given), generation_config=config, streamer=pieces,
                    stopping_criteria=stopping(stop), past_key_values=answer.cache,
                )  # fmt: skip
                answer.cache = out.past_key_values
            except BaseException:
                pieces.end()
                raise

        try:
            with beside(work, stop):
                yield from pieces
        finally:
            self._count(len(ids), answer)

    def _count(self, prompt_tokens: int, answer: Answer) -> None:
        self.prompt_tokens += prompt_tokens
        self.new_tokens += len(answer.ids)
        if answer.ids:
            self.first_s.append(answer.first_s)
            self.later += len(answer.ids) - 1
            self.later_s += answer.whole_s - answer.first_s

    def _since(self, before: Any) -> dict[str, Any]:
        now = self.loaded.offloaded.stats()
        accesses = now.accesses - before.accesses
        return {
            "hit_rate": (now.hits - before.hits) / accesses if accesses else None,
            "bytes_read": now.bytes - before.bytes,
        }

    def _object(self, prompt: str, text: str, length: int, new: list[int], figures: dict[str, Any]) -> None:
        ended = self.loaded.tokenizer.eos_token_id, self.config.eos_token_id
        ends = {end for some in ended for end in (some if isinstance(some, list) else [some])}
        finish = "stop" if new and new[-1] in ends else "length"
        found = {"prompt": prompt, "text": text, "prompt_tokens": length, "new_tokens": len(new), "finish": finish}
        self.out.piece(json.dumps(found | (figures if self.args.stats else {})) + "\n")

    def rows(self) -> list[tuple[str, str]]:
        """What it all took, as measured."""
        stats, peak = self.loaded.offloaded.stats(), peak_bytes()
        first = f"{sum(self.first_s) / len(self.first_s):.2f} s" if self.first_s else "not measured"
        speed = f"{self.later / self.later_s:.2f} tokens/s" if self.later_s else "not measured"
        return [
            ("tokens", f"{self.prompt_tokens:,} in prompts, {self.new_tokens:,} new"),
            ("loading", f"{self.loaded.load_s:.2f} s"),
            ("first token", first + (f", mean of {len(self.first_s)} answers" if len(self.first_s) > 1 else "")),
            ("whole batches" if self.args.batch > 1 else "after the first", speed),
            ("hit rate", f"{stats.hits / stats.accesses:.1%} of {stats.accesses:,}" if stats.accesses else "no expert"),
            ("experts read", f"{stats.loads:,}, {stats.bytes / 1e9:.3g} GB"),
            ("waited for them", f"{stats.wait_s:.2f} s"),
            ("peak memory", "unknown" if peak is None else f"{peak / 1e9:.3g} GB"),
        ]


@contextmanager
def beside(work: Callable[[], None], stop: threading.Event) -> Iterator[None]:
    """Work in a thread, for the length of a `with`, which ends when the work has: a signal, or an error here, sets
    `stop` first. What fails there is raised here."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="headgate-generate")
    thread.start()
    try:
        yield
        thread.join()
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def stopping(stop: threading.Event) -> list[Any]:
    """For `generate`: ends after the next token, once `stop` is set."""
    import torch
    from transformers import StoppingCriteria

    class Stopped(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

    return [Stopped()]


def generation_of(loaded: loading.Loaded, args: argparse.Namespace) -> Any:
    """The model's own generation config with what the command line says."""
    from copy import deepcopy

    config = deepcopy(loaded.model.generation_config)
    if args.temperature is not None:
        config.do_sample = args.temperature >= COLDEST
        config.temperature = args.temperature
    if args.top_p is not None:
        config.top_p = args.top_p
        config.do_sample = config.do_sample if args.temperature is not None else True
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    if config.pad_token_id is None:
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    config.max_length = None
    return config


def peak_bytes() -> int | None:
    """The most memory that this process had at once (VmHWM), where the system says."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def _temperature(text: str) -> float:
    value = number(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be from 0 to 100, got {text!r}")
    return value


def _share(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value
