"""The demo at a tiny size: all of it, cut short, and refused."""

import io
import json
import threading

import numpy as np
import pytest
import torch
from html_page import Page

pytest.importorskip("transformers")

from headgate.bench.corpus import baselines, read_corpus
from headgate.bench.output import write_text
from headgate.bench.screen import Screen
from headgate.cli.demo import chapters as demo
from headgate.cli.demo import files, speed, swap, train
from headgate.placement.traces.trace import Trace

TINY = demo.Shape(layers=2, hidden=16, ffn=8, experts=4, top_k=2, heads=2, length=32)
LINE = b"def add(a, b):\n    return a + b\n\n\n"
PARTS = ["metrics.json", "model", "placement.json", "report.html", "report.png", "trace.npz"]


@pytest.fixture
def options(tmp_path):
    path = tmp_path / "text.py"
    path.write_bytes(LINE * 400)

    def make(**changes):
        return demo.Options(**{
            "text": path, "output": tmp_path / "out", "steps": 12, "rows": 2, "shape": TINY, "speed_seconds": 0.0,
            "learning_rate": 1e-2, **changes,
        })  # fmt: skip

    return make


@pytest.fixture
def screen():
    return Screen(io.StringIO(), io.StringIO())


def test_the_whole_tour(options, screen):
    out = options().output
    tour = demo.run(options(), screen)
    assert sorted(p.name for p in out.iterdir()) == PARTS
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.keys() == {"about", *(chapter.name for chapter in demo.CHAPTERS)}
    assert metrics["about"]["interrupted"] is None
    assert metrics["swap"]["blocks_replaced"] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert metrics["swap"]["headgate_against_eager"]["output"] < 2e-5
    assert metrics["swap"]["headgate_against_eager"]["gradient"] < 2e-5
    kept = metrics["speed"]["kept_by_experts_bytes"]
    assert metrics["speed"]["median_over_fastest"] >= 1
    assert metrics["speed"]["cores_had"] > 0
    assert 0 < kept["headgate"] < min(kept["eager"], kept["grouped_mm"])
    learned = metrics["train"]
    assert len(learned["train"]) == learned["steps"] == 12
    assert learned["final_bits_per_byte"] < learned["held_out"][0][1] - 0.5
    trace = Trace.load(out / "trace.npz")
    assert trace.expert_ids.shape == (2, metrics["routing"]["tokens"], 2)
    assert np.array(metrics["routing"]["load"]).sum() == trace.live.sum()
    page = (out / "report.html").read_text()
    found = Page(page)
    assert found.open == []
    assert found.loads == []
    assert page.count("<section") == len(demo.CHAPTERS)
    assert "12/12" in screen.progress.file.getvalue()
    assert tour.metrics == metrics


def test_the_saved_model_is_plain_transformers(options, screen):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tour = demo.run(options(), screen, chapters=[demo.CHAPTERS[0], demo.CHAPTERS[2]])
    folder = tour.options.output / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("é\n\tdef 0", return_tensors="pt").input_ids
    assert bytes(ids[0].tolist()) == "é\n\tdef 0".encode()
    assert tokenizer.decode(ids[0]) == "é\n\tdef 0"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tour.model(ids).logits, rtol=1e-4, atol=1e-5)


def _interrupting(chapter):
    """The chapter, stopped by Ctrl-C after it has done its work."""

    def run(tour):
        chapter.run(tour)
        raise KeyboardInterrupt

    return demo.Chapter(chapter.name, chapter.title, run, chapter.section)


def test_ctrl_c_in_training_keeps_what_there_is(options, screen, monkeypatch):
    calls = threading.local()
    calls.count = 0
    step = train.Optimizer.step

    def stopping(self, *args):
        calls.count += 1
        if calls.count == 4:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(train.Optimizer, "step", stopping)
    tour = demo.run(options(), screen, chapters=[c for c in demo.CHAPTERS if c.name != "speed"])
    assert tour.interrupted == "train"
    out = options().output
    assert sorted(p.name for p in out.iterdir()) == ["metrics.json", "model", "report.html", "report.png"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["train"]["train"]) == 3
    assert metrics["about"]["interrupted"] == "train"
    page = (out / "report.html").read_text()
    assert "Interrupted" in page
    assert Page(page).open == []


def test_ctrl_c_is_status_130(options, monkeypatch, capsys):
    from headgate import cli

    monkeypatch.setattr(demo, "CHAPTERS", [_interrupting(demo.Chapter("none", "None", lambda tour: None, str))])
    given = options()
    assert cli.main(["demo", "--json", "--text", str(given.text), "--output", str(given.output)]) == 130
    said = capsys.readouterr()
    assert json.loads(said.out) == {}
    assert "interrupted in the chapter 'None'" in said.err


def test_a_shorter_run_leaves_nothing_of_the_longer_one_before_it(options, screen):
    chapters = [demo.CHAPTERS[0], demo.CHAPTERS[3]]
    demo.run(options(), screen, chapters)
    assert (options().output / "trace.npz").exists()
    demo.run(options(), screen, [_interrupting(demo.CHAPTERS[0])])
    assert sorted(p.name for p in options().output.iterdir()) == ["metrics.json", "model", "report.html", "report.png"]


def test_an_error_in_a_chapter_keeps_the_others_work(options, screen):
    def broken(tour):
        raise RuntimeError("no such thing")

    chapters = [demo.CHAPTERS[0], demo.Chapter("broken", "Broken", broken, lambda tour: "")]
    with pytest.raises(RuntimeError, match="no such thing"):
        demo.run(options(), screen, chapters)
    assert (options().output / "model" / "model.safetensors").exists()


def test_bad_input_is_refused_before_any_work(options, screen, tmp_path, monkeypatch):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            demo.run(options(**changes), screen)

    refused("--text must be a file that can be read", text=tmp_path / "none")
    refused("--text must be a file that can be read", text=tmp_path)
    small = tmp_path / "small.txt"
    small.write_bytes(b"x" * 1279)
    refused("must have at least 1,280 bytes, got 1,279", text=small)
    refused("--output must be a folder, got the file", output=small)
    refused("--output must be writable", output=small / "inside")
    foreign = tmp_path / "foreign"
    (foreign / "model").mkdir(parents=True)
    refused("--output must be new or written by an earlier demo, got .*, which holds model", output=foreign)
    monkeypatch.setattr(demo, "NEED_BYTES", 10**18)
    refused("--output needs 1,000,000,000,000 MB of free space")
    with pytest.raises(ValueError, match="--steps must be at least 1, got 0"):
        options(steps=0)
    with pytest.raises(ValueError, match="--seed must be"):
        options(seed=-1)
    assert not swap.__dict__.get("tour")
    assert list(foreign.iterdir()) == [foreign / "model"]


def test_a_part_that_fails_is_not_half_written(tmp_path):
    old = tmp_path / "model"
    old.mkdir()
    (old / "weights").write_text("old")

    def fail(folder):
        (folder / "weights").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        files.write_folder(old, fail)
    write_text(tmp_path / "report.html", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "report.html", "half \ud800")
    assert (old / "weights").read_text() == "old"
    assert (tmp_path / "report.html").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "report.html"]


def test_training_fits_its_time_on_a_machine_that_slows_down(options, screen, monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(train.time, "perf_counter", clock)
    monkeypatch.setattr(train, "choose_steps", lambda tour: 200)
    tour = demo.run(options(steps=None, train_seconds=10.0), screen, chapters=[demo.CHAPTERS[0], demo.CHAPTERS[2]])
    assert 1 <= len(tour.metrics["train"]["train"]) < 20


def test_the_corpus_of_any_machine():
    corpus = read_corpus(None, 256)
    assert len(corpus.train) > 10 * len(corpus.held_out) / 2
    assert len(corpus.held_out) > 50_000
    batch = next(corpus.batches(3, 64, seed=0))
    assert batch.shape == (3, 64)
    assert 0 <= int(batch.min()) <= int(batch.max()) < 256
    held = corpus.held_out_batches(4, 64, 3)
    assert [tuple(b.shape) for b in held] == [(4, 64)] * 3
    below = baselines(corpus)
    assert 8 == below["uniform"] > below["unigram"] > below["bigram"] > 2


def test_the_learning_rate_rises_and_falls():
    rates = [train.learning_rate(i / 100, 1.0) for i in range(101)]
    assert max(rates) == rates[10] == 1.0
    assert rates[0] < 0.2
    assert rates[100] == pytest.approx(0.05)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(("spread", "cores", "fine"), [(1.1, 1.9, True), (1.6, 1.9, False), (1.1, 0.7, False)])
def test_speeds_of_a_busy_machine_are_marked(spread, cores, fine):
    assert speed.reliable({"median_over_fastest": spread, "cores_had": cores}) is fine
