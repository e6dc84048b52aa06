"""`headgate generate`: the answers are those of the model in memory; figures, chats, odd words, and Ctrl-C."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import sys

import pytest
import talking
import torch
from signalled import STATUS, Process

import headgate
from headgate import cli
from headgate.cli import generate, loading
from headgate.moe.offload.offload import Offload

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return talking.save(tmp_path_factory.mktemp("talking"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The same, whose tokenizer has no chat template."""
    return talking.save(tmp_path_factory.mktemp("bare"), template=None)


@pytest.fixture(scope="module")
def whole(folder):
    """The model in memory: `whole(text, new)` is its greedy answer; `whole.ids` are its tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def answer(text: str, new: int) -> str:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :]
        answer.ids = out.tolist()
        return tokenizer.decode(out, skip_special_tokens=True)

    return answer


def asked(*said: str) -> str:
    """The text that the template makes of messages that change sides, the user's first."""
    sides = ("user", "assistant")
    return "".join(f"{sides[i % 2]}: {text}\n" for i, text in enumerate(said)) + "assistant: "


def told(capsys, *words: object) -> tuple[str, str]:
    assert cli.main(["generate", *map(str, words)]) == 0
    said = capsys.readouterr()
    return said.out, said.err


GREEDY = ("--temperature", "0", "--budget", "30%")


def test_an_answer_is_that_of_the_model_in_memory(folder, whole, capsys):
    out, err = told(capsys, folder, *GREEDY, "--prompt", "why?", "--max-new-tokens", 20, "--stats")
    assert out == whole(asked("why?"), 20) + "\n"
    figures = dict(line.split("  ", 1) for line in err.splitlines())
    assert figures["tokens"].strip() == f"{len(asked('why?'))} in prompts, 20 new"
    assert {"loading", "first token", "hit rate", "experts read", "peak memory"} < set(figures)
    assert (
        told(capsys, folder, *GREEDY, "--prompt", "why?", "--raw", "--max-new-tokens", 9)[0] == whole("why?", 9) + "\n"
    )
    system = told(capsys, folder, *GREEDY, "--prompt", "why?", "--system", "Be brief.", "--max-new-tokens", 9)[0]
    assert system == whole("system: Be brief.\n" + asked("why?"), 9) + "\n"


def test_standard_input_is_a_prompt(folder, whole, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("tell me\n"))
    assert told(capsys, folder, *GREEDY, "--max-new-tokens", 5)[0] == whole(asked("tell me"), 5) + "\n"


@pytest.mark.parametrize("batch", [1, 2])
def test_a_file_gives_one_object_a_line_and_nothing_else(folder, whole, capsys, tmp_path, batch):
    prompts = ["one", "twenty two", "three"]
    (tmp_path / "prompts").write_text("one\n\ntwenty two\n  \nthree")
    words = (folder, *GREEDY, "--file", tmp_path / "prompts", "--batch", batch, "--json", "--stats")
    out, _ = told(capsys, *words, "--max-new-tokens", 8)
    found = [json.loads(line) for line in out.splitlines()]
    assert [one["prompt"] for one in found] == prompts
    for one in found:
        assert one["text"] == whole(asked(one["prompt"]), 8)
        assert (one["prompt_tokens"], one["new_tokens"], one["finish"]) == (len(asked(one["prompt"])), 8, "length")
        assert one["bytes_read"] > 0
        assert 0 < one["hit_rate"] < 1
        assert one["batch_s"] > 0 if batch > 1 else one["tokens_per_s"] > 0


def test_the_figures_are_those_of_the_engine_and_the_clock(folder, capsys, monkeypatch):
    kept = []
    opened = loading.opened
    monkeypatch.setattr(generate.loading, "opened", lambda *of: kept.append(opened(*of)) or kept[-1])
    started = []
    monkeypatch.setattr(generate.Job, "rows", lambda job: started.append(job) or [])
    out, _ = told(capsys, folder, "--budget", "30%", "--prompt", "why?", "--max-new-tokens", 6, "--stats", "--json")
    one, stats = json.loads(out), started[0].loaded.offloaded.stats()
    assert one["bytes_read"] == stats.bytes
    assert one["hit_rate"] == stats.hits / stats.accesses
    assert 0 < one["first_token_s"] < 60
    assert generate.peak_bytes() > torch.zeros(1).nbytes


def test_an_end_token_ends_an_answer(folder, whole, capsys, tmp_path):
    copy = tmp_path / "ends"
    shutil.copytree(folder, copy)
    whole(asked("why?"), 8)
    end = whole.ids[3]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [end], "pad_token_id": 0}))
    (tmp_path / "prompts").write_text("why?\nwhy?")
    for batch in (1, 2):
        words = (copy, *GREEDY, "--file", tmp_path / "prompts", "--batch", batch, "--json", "--max-new-tokens", 8)
        found = [json.loads(line) for line in told(capsys, *words)[0].splitlines()]
        new = whole.ids.index(end) + 1
        assert [(one["new_tokens"], one["finish"]) for one in found] == [(new, "stop")] * 2


def test_a_seed_repeats_an_answer(folder, capsys):
    def once(seed):
        words = ("--prompt", "why?", "--temperature", "1.5", "--top-p", "0.9", "--seed", seed, "--max-new-tokens", 12)
        return told(capsys, folder, *words)[0]

    assert once(1) == once(1) != once(2)


def test_a_chat_remembers_and_computes_only_what_is_new(folder, whole, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nand then?\n"))
    rows = []
    before = Offload.compute

    def counted(self, index, given, routing):
        rows.append(len(given))
        return before(self, index, given, routing)

    monkeypatch.setattr(Offload, "compute", counted)
    out, _ = told(capsys, folder, *GREEDY, "--chat", "--max-new-tokens", 5)
    first = whole(asked("hello"), 5)
    second = whole(asked("hello", first, "and then?"), 5)
    assert out == f"{first}\n{second}\n"
    again, layers = len(asked("hello", first, "and then?")) - len(asked("hello") + first) + 1, 2
    assert [n for n in rows if n > 1] == [len(asked("hello"))] * layers + [again] * layers


def test_experts_in_few_bits_are_written_once(folder, capsys, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    words = ("--prompt", "a", "--max-new-tokens", "3", "--disk", tmp_path, "--formats", "int4", "--temperature", "0")
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    first = told(capsys, folder, *words)[0]
    bars = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert "16/16 experts" in bars
    assert "21/21 tensors" in bars
    written = (tmp_path / "experts.safetensors").stat().st_mtime_ns
    monkeypatch.undo()
    out, err = told(capsys, folder, *words)
    assert (out, err) == (first, "")
    assert (tmp_path / "experts.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt", "  "], "generate: --prompt must have a prompt, got nothing"),
        (["--prompt", "a" * 600], f"must have at most {talking.CONTEXT} tokens for this model, got a prompt of 618"),
        (["--prompt", "a", "--max-new-tokens", "500"], "got a prompt of 19 and --max-new-tokens 500"),
        (["--chat", "--json"], "generate: --json must come with prompts, got --chat"),
        (["--chat", "--raw"], "generate: --raw must be without --chat"),
        (["--prompt", "a", "--batch", "2"], "generate: --batch must come with --file, got 2"),
        (["--prompt", "a", "--chat"], "argument --chat: not allowed with argument --prompt"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature: must be from 0 to 100, got '-1'"),
        (["--prompt", "a", "--top-p", "0"], "--top-p: must be above 0 and at most 1, got '0'"),
        (["--prompt", "a", "--budget", "0"], "offload: budget must be"),
        (["--prompt", "a", "--formats", "int4"], "load: disk must be a folder for experts in few bits"),
        (["--prompt", "a", "--policy", "learned"], "learned"),
        (["--file", "MISSING"], "MISSING"),
        ([], "generate: standard input must have a prompt, got nothing"),
    ],
)
def test_an_odd_line_is_refused_in_one_line(folder, capsys, monkeypatch, words, says):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    try:
        status = cli.main(["generate", str(folder), *words])
    except SystemExit as stop:  # argparse
        status = stop.code
    said = capsys.readouterr()
    assert status == (1 if words == ["--file", "MISSING"] else 2)
    assert says in said.err.splitlines()[-1]
    assert not said.out


def test_a_model_without_a_template_or_a_tokenizer_says_so(bare, folder, capsys, tmp_path):
    for words in (["--chat"], ["--prompt", "a", "--system", "b"]):
        assert cli.main(["generate", str(bare), *words]) == 2
        assert (
            f"{words[-2] if len(words) > 1 else '--chat'} must have a model with a chat template"
            in capsys.readouterr().err
        )
    assert told(capsys, bare, *GREEDY, "--prompt", "why?", "--max-new-tokens", 4)[0]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert cli.main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "generate: MODEL must have a tokenizer" in capsys.readouterr().err


def test_an_error_amid_an_answer_is_the_commands(folder, capsys, monkeypatch):
    def broken(self, index, rows, routing):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Offload, "compute", broken)
    assert cli.main(["generate", str(folder), "--prompt", "a"]) == 1
    assert capsys.readouterr().err == "headgate: the disk is gone\n"


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_an_answer_at_its_next_token(folder, tmp_path, number):
    process = Process(
        ["generate", str(folder), "--prompt", "why?", "--max-new-tokens", "450", "--budget", "30%"], tmp_path
    )
    process.wait_until(lambda: len(process.output()) > 3)
    process.process.send_signal(number)
    ended = process.ended()
    assert ended.status == STATUS[number], ended
    assert ended.said == f"headgate: {'interrupted' if number == signal.SIGINT else 'terminated'}\n"
    assert len(ended.out) < 440
    assert not ended.children


def test_a_gguf_file_answers_with_the_tokenizer_beside_its_config(folder, whole, capsys, tmp_path):
    pytest.importorskip("gguf")
    headgate.pack(folder, tmp_path / "m.gguf")
    words = (*GREEDY, "--prompt", "why?", "--max-new-tokens", 9)
    for model in (tmp_path / "m.gguf", tmp_path):  # a folder with one
        assert told(capsys, model, "--config", folder, *words)[0] == whole(asked("why?"), 9) + "\n"
    for model, more, says in (
        (tmp_path / "m.gguf", (), "MODEL must have a tokenizer that transformers can read, got "),
        (tmp_path / "m.gguf", (), " (--config DIR may hold one)"),
        (folder, ("--config", folder), "generate: --config must come with a GGUF file, got "),
        (tmp_path / "m.gguf", ("--config", tmp_path / "no"), "generate: --config must be a folder with config.json"),
        (folder / "config.json", (), "MODEL must be a transformers model folder or a GGUF file, got the file "),
    ):
        assert cli.main(["generate", *map(str, (model, *more, *words))]) == 2
        assert says in capsys.readouterr().err


def test_a_gguf_file_answers_with_its_own_tokenizer(folder, tmp_path):
    gguf = pytest.importorskip("gguf")
    file = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    words = ["a", "b", "ab", "<end>"]
    file.add_tokenizer_model("gpt2")
    file.add_token_list(words)
    file.add_token_types([1, 1, 1, 3])
    file.add_token_merges(["a b"])
    file.add_eos_token_id(3)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.close()
    assert loading.tokenizer_of(tmp_path / "m.gguf", "generate")("abba")["input_ids"] == [2, 1, 0]
    assert len(loading.tokenizer_of(tmp_path, "generate", folder)("abba")["input_ids"]) == 4
