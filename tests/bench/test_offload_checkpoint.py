"""`headgate bench offload --rows checkpoint`, small: every part runs, says the same tokens, and its tools measure."""

from __future__ import annotations

import io
import json
import mmap
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from headgate import cli  # noqa: E402
from headgate.bench.offload import command  # noqa: E402
from headgate.bench.offload.checkpoint import files, gguf_file, jobs, make, parts, processes, rows  # noqa: E402
from headgate.bench.offload.checkpoint.held import Held, spans_of  # noqa: E402

SIZES = make.Sizes().scaled(0.05)
TOKENS = {"prompt": 6, "warm": 2, "tokens": 4}
Done = processes.Done


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The row's case, with jobs and lines of headgate run in this process."""

    def run(name, options):
        return Done(jobs.main({"job": name, "begun": 0.0, **options}), 3 << 30, 2 << 30, 1.0, 1.0)

    def line(words):
        with redirect_stdout(io.StringIO()):
            assert cli.main(words) == 0
        return Done({}, 3 << 30, 2 << 30, 1.0, 1.0)

    return parts.Case(tmp_path_factory.mktemp("bench"), SIZES, run, line, TOKENS)


def lines_of(case, name):
    return {line.what: line for line in parts.PARTS[name](case)}


def test_a_quarter_of_the_experts_says_what_all_of_them_say(case):
    found = lines_of(case, "decode")
    assert len(found) == 2
    assert all(line.note.endswith("tokens the same") for line in found.values())
    assert len(set(case.resident["answers"])) > 1
    assert 0 < case.direct["hit_rate"] < 1
    routes = np.load(case.routes)
    assert routes.shape == (sum(TOKENS.values()), SIZES.layers, SIZES.top_k)
    assert all(len(set(row)) == SIZES.top_k for row in routes.reshape(-1, SIZES.top_k))


def test_accelerate_takes_the_same_model_from_the_disk(case):
    (line,) = lines_of(case, "accelerate").values()
    assert line.note.endswith("100% of the answers the same")
    assert case.figures["accelerate"]["stayed"] <= 0.1, "the next token finds nothing in memory"
    assert case.figures["accelerate"]["read_bytes"] > 0
    assert not (case.folder / "accelerate").exists()


def test_every_part_has_its_lines_and_leaves_no_file_of_its_own(case):
    before = sorted(case.folder.iterdir())
    found = [line for name in ("start", "cold", "pack", "doctor") for line in lines_of(case, name).values()]
    assert sorted(case.folder.iterdir()) == before
    assert all(line.value is not None for line in found)
    over = found[0].value * 1e9
    assert over == (3 << 30) - SIZES.rest_bytes - SIZES.expert_bytes // 4
    assert tuple(parts.PARTS) == command.PARTS


def test_verdicts():
    at_most = [parts.Line("", value, "", 2.0, 1.0).verdict for value in (0.9, 1.0, 1.5, 2.1)]
    assert at_most == ["stretch", "stretch", "reached", "missed"]
    assert [parts.Line("", value, "", 3.0, least=True).verdict for value in (2.9, 3.0)] == ["missed", "reached"]
    assert parts.Line("", None).verdict == "skipped"
    assert parts.Line("", 1.0).verdict == ""


def test_what_is_not_installed_is_skipped_by_name(case, monkeypatch):
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    for name, said in (("llama", "llama-cpp-python, gguf"), ("accelerate", "accelerate")):
        (line,) = lines_of(case, name).values()
        assert (line.value, line.note) == (None, f"not installed: {said}")
        assert rows._cells(line, 1.0)[4] == "skipped"


def test_a_checkpoint_is_made_once_and_is_one_that_transformers_takes(tmp_path):
    folder = make.make(tmp_path / "one", SIZES)
    shard = make.shards(folder)[0]
    made = shard.stat().st_mtime_ns
    _, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(each.stat().st_size for each in make.shards(folder)) > SIZES.expert_bytes + SIZES.rest_bytes
    make.make(folder, SIZES)
    assert shard.stat().st_mtime_ns == made
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    (folder / ".tmpkilled").touch()
    make.make(folder, SIZES)
    assert shard.stat().st_mtime_ns != made
    assert not (folder / ".tmpkilled").exists()
    (folder / "mine.txt").touch()
    with pytest.raises(ValueError, match="--folder must be for this benchmark alone"):
        make.make(folder, make.Sizes().scaled(0.2))
    make.remove(folder)
    assert [each.name for each in folder.iterdir()] == ["mine.txt"]


def test_shards_are_cut_by_size_and_nothing_stays_of_an_interrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "SHARD_bytes", 3_000_000)
    folder = make.make(tmp_path / "one", SIZES)
    assert len(make.shards(folder)) > 4
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {each.name for each in make.shards(folder)}
    monkeypatch.setattr(make, "_mark", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make.make(tmp_path / "two", SIZES)
    assert not (tmp_path / "two").exists()


# --- processes, files, memory ----------------------------------------------------------------------------------------


def test_a_process_is_watched_to_its_end():
    code = "x = bytearray(300_000_000); import time; time.sleep(0.3); del x; print('noise'); print('{\"a\": 1}')"
    done = processes.watched([sys.executable, "-c", code], None, 60)
    assert done.said == {"a": 1}
    assert 300e6 < done.anonymous_bytes < done.peak_bytes < 400e6
    assert done.cpu_s > 0
    assert done.wall_s > 0.3
    with pytest.raises(RuntimeError, match="ended with 3: why"):
        processes.watched([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"], None, 60)
    with pytest.raises(RuntimeError, match=r"took more than 0\.1 s"):
        processes.watched([sys.executable, "-c", "import time; time.sleep(60)"], None, 0.1)


@pytest.mark.slow
def test_a_job_in_a_process_of_its_own(tmp_path):
    folder = make.make(tmp_path / "one", SIZES)
    done = processes.job(1)("first", {"folder": str(folder), "budget": "25%", "vocab": SIZES.vocab, "prompt": 6})
    assert done.said["slots_bytes"] == SIZES.expert_bytes // 4
    assert 0 < done.said["imports_s"] < done.said["first_s"] < done.wall_s
    assert done.peak_bytes > done.anonymous_bytes > SIZES.expert_bytes // 4


@pytest.fixture
def mapped(tmp_path):
    """A file of 64 pages on a disk whose page cache can be asked and emptied, mapped."""
    path = tmp_path / "pages"
    path.write_bytes(bytes(64 * mmap.PAGESIZE))
    files.warm([path])
    if files.cached_share([path]) < 1 or files.drop([path]) > 0:
        pytest.skip("this file system keeps its pages to itself")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        yield path, pages


def test_the_page_cache_is_filled_and_emptied(mapped):
    path, _ = mapped
    assert files.warm([path]) == 1
    assert files.drop([path]) == 0
    assert files.disk_GBps(path) > 0


def test_a_rival_is_held_to_the_experts_that_it_used_last(mapped):
    path, pages = mapped
    page = mmap.PAGESIZE

    def touch(layer, e):
        return pages[(layer * 16 + e * 4) * page : (layer * 16 + e * 4 + 4) * page]

    def held_pages():
        state = files.resident(np.frombuffer(pages, np.uint8))
        return {(i // 16, i % 16 // 4) for i in np.flatnonzero(state)} - {(2, e) for e in range(4)}

    spans = {(layer, e): [((layer * 16 + e * 4) * page, 4 * page)] for layer in range(2) for e in range(4)}
    files.warm([path])
    held = Held(path, spans, 3 * 4 * page)
    assert not {*spans} & held_pages(), "it begins with no expert in memory"
    pages.madvise(mmap.MADV_RANDOM)  # no page is read ahead
    for layer, e in ((0, 0), (1, 1), (0, 2)):
        touch(layer, e)
    held.used(np.array([[0, 2], [1, 1]]))
    assert {*spans} & held_pages() == {(0, 0), (1, 1), (0, 2)}
    touch(0, 0)
    touch(1, 3)
    held.used(np.array([[0], [3]]))
    assert {*spans} & held_pages() == {(0, 0), (1, 1), (1, 3)}, "(0, 2) was used least recently"
    held.close()


def test_the_gguf_file_holds_the_same_numbers(case):
    gguf = pytest.importorskip("gguf")
    from headgate.moe.offload.checkpoint import Checkpoint

    checkpoint, path = Checkpoint(case.model), case.folder / "small.gguf"
    gguf_file.write(SIZES, checkpoint.read, path)
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {*there} == {name for name, _ in gguf_file.names(SIZES)}
    for name, keys in gguf_file.names(SIZES):
        data = torch.from_numpy(there[name].data.copy())
        data = data if data.dtype == torch.float32 else data.view(torch.bfloat16)
        want = torch.stack([checkpoint.read(key) for key in keys])
        assert torch.equal(data.reshape(want.shape).float(), want.float()), name
    raw, spans = path.read_bytes(), spans_of(path, SIZES.experts)
    assert len(spans) == SIZES.layers * SIZES.experts
    offset, size = spans[1, 3][1]
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert raw[offset : offset + size] == checkpoint.read(key).view(torch.uint8).numpy().tobytes()
    checkpoint.close()
    path.unlink()


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_removes_what_it_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "job", lambda threads: lambda name, options: Done({}, 0, 0, 0.0, 0.0))
    monkeypatch.setattr(rows, "command", lambda words, threads: Done({}, 500_000_000, 400_000_000, 2.0, 1.5))
    to, folder = tmp_path / "f.json", tmp_path / "made"
    words = ["--rows", "checkpoint", "--folder", str(folder), "--scale", "0.05", "--parts", "doctor", "--remove"]
    assert cli.main(["bench", "offload", *words, "--json", str(to)]) == 0
    said = capsys.readouterr().out
    assert "doctor MODEL: peak memory" in said
    assert "0.50 GB" in said
    assert not folder.exists()
    row = json.loads(to.read_text())["rows"]["checkpoint"]
    assert row["figures"]["figures"]["doctor"]["cpu_s"] == 1.5
    assert row["figures"]["sizes"]["hidden"] == 256


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--rows checkpoint eviction", "--rows checkpoint must go alone"),
        ("--rows checkpoint --scale 2", "--scale must be above 0 and at most 1, got 2"),
        ("--rows checkpoint --scale 0", "--scale must be above 0 and at most 1, got 0"),
        ("--rows eviction --remove", "--remove must come with --rows checkpoint"),
        ("--rows eviction --parts start", "--parts must come with --rows checkpoint"),
        ("--rows checkpoint --parts start --scale 0.05 --folder FILE", "--folder must be a folder"),
    ],
)
def test_options_that_do_not_go_together(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    assert cli.main(["bench", "offload", *words.split()]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_llama_cpp_says_the_same_tokens_within_the_same_memory(case):
    pytest.importorskip("llama_cpp")
    (line,) = lines_of(case, "llama").values()
    found = case.figures["llama.cpp"]
    assert found["over_bytes"] <= 0.1 * SIZES.expert_bytes
    assert sum(a == b for a, b in zip(found["answers"], case.direct["answers"], strict=True)) >= 5, line.note
