"""headgate trace: what it writes, what it shows, its exit status."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from headgate import cli
from headgate.placement.traces.affinity import expert_load, imbalance
from headgate.placement.traces.drift import drift
from headgate.placement.traces.file import TraceFile
from headgate.placement.traces.generate import generate, like_deepseek_v2_lite
from headgate.placement.traces.trace import Trace

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, naïvely.\n" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as save_pretrained leaves it, without a tokenizer."""
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 256, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_experts": 6, "num_experts_per_tok": 2, "pad_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**shape)).save_pretrained(path)
    return path


def test_it_records_a_model_on_the_bytes_of_a_text(folder, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    from headgate.moe.record import record

    (tmp_path / "t.txt").write_text(TEXT)
    output = tmp_path / "t.npz"
    argv = ["trace", str(folder), "--text", str(tmp_path / "t.txt"), "--length", "50", "--output", str(output)]
    assert cli.main([*argv, "--tokens", "730", "--weights"]) == 0
    assert "730 tokens of" in capsys.readouterr().out
    ids = torch.tensor(list(TEXT.encode())[:800]).view(16, 50)
    expected = record(AutoModelForCausalLM.from_pretrained(folder), ids, weights=True, max_tokens=730)
    found = Trace.load(output)
    for name in ("expert_ids", "sequence", "weights"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert cli.main([*argv, "--tokens", "99999", "--sample", "0.5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    every = len(TEXT.encode())
    assert every * 0.2 < said["tokens"] < every * 0.8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.npz", "t.txt"]


def test_it_uses_the_folders_tokenizer(folder, tmp_path, capsys):
    from headgate.cli.demo.model import tokenizer

    (tmp_path / "t.txt").write_text(TEXT)
    argv = ["--text", str(tmp_path / "t.txt"), "--tokens", "200", "--length", "40", "--output", str(tmp_path / "t.npz")]
    assert cli.main(["trace", str(folder), *argv]) == 0
    assert "bytes, as the folder has no tokenizer" in capsys.readouterr().out
    by_bytes = Trace.load(tmp_path / "t.npz").expert_ids
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tokenizer().save_pretrained(copy)  # its ids are the bytes
    assert cli.main(["trace", str(copy), *argv]) == 0
    assert "(its tokenizer)" in capsys.readouterr().out
    np.testing.assert_array_equal(Trace.load(tmp_path / "t.npz").expert_ids, by_bytes)


def test_it_converts_and_shows_loads_where_there_is_no_more(tmp_path, capsys):
    ids = np.random.default_rng(0).random((3, 40, 9)).argsort(-1)[..., :2]
    np.save(tmp_path / "v.npy", ids.transpose(1, 0, 2).astype(np.int16))
    argv = ["trace", "--from", str(tmp_path / "v.npy"), "--output", str(tmp_path / "t.npz")]
    assert cli.main([*argv, "--experts", "12", "--tokens", "30"]) == 0
    found = Trace.load(tmp_path / "t.npz")
    np.testing.assert_array_equal(found.expert_ids, ids[:, :30])
    assert found.num_experts == 12
    rows = ids.transpose(1, 0, 2).tolist()
    answer = {"prompt_routed_experts": rows[:30], "choices": [{"routed_experts": rows[30:]}]}
    (tmp_path / "v.json").write_text(json.dumps(answer))
    assert cli.main(["trace", "--from", str(tmp_path / "v.json"), "--output", str(tmp_path / "t.npz")]) == 0
    np.testing.assert_array_equal(Trace.load(tmp_path / "t.npz").expert_ids, ids)
    assert "tokens: 30 in prompt_routed_experts, 10 generated" in capsys.readouterr().out
    np.save(tmp_path / "w.npy", np.array([[3, 1], [2, 2]]))
    assert cli.main(["trace", "--from", str(tmp_path / "w.npy"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [load["max_over_mean"] for load in said["load"]] == [1.5, 1.0]
    assert cli.main(["trace", "--from", str(tmp_path / "w.npy"), "--output", str(tmp_path / "u.npz")]) == 2
    assert "must hold the choices of tokens to become a trace" in capsys.readouterr().err
    assert not (tmp_path / "u.npz").exists()


def test_what_it_shows_is_what_the_library_says(tmp_path, capsys):
    trace, other = generate(3, 16, 2, 3000, seed=1), generate(3, 16, 2, 2000, seed=2)
    trace.save(tmp_path / "a.npz")
    other.save(tmp_path / "b.npz")
    argv = ["trace", "--show", str(tmp_path / "a.npz"), "--against", str(tmp_path / "b.npz")]
    assert cli.main([*argv, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["layers"], found["tokens"], found["top_k"], found["experts"], found["sequences"]) == (
        3,
        3000,
        2,
        16,
        24,
    )
    worst = imbalance(expert_load(trace))
    assert [load["max_over_mean"] for load in found["load"]] == worst.tolist()
    assert [load["busiest"] for load in found["load"]] == expert_load(trace).argmax(1).tolist()
    far = drift(trace, other)
    assert found["drift"]["load"] == far.load.tolist()
    assert cli.main(argv) == 0
    told = capsys.readouterr().out
    assert told == said.err
    assert f"mean of the layers: {worst.mean():.2f}" in told
    assert str(far) in told


def test_it_generates(tmp_path, capsys):
    argv = ["trace", "--generate", "--tokens", "600", "--seed", "3", "--output", str(tmp_path / "t.npz")]
    assert cli.main(argv) == 0
    np.testing.assert_array_equal(Trace.load(tmp_path / "t.npz").expert_ids, like_deepseek_v2_lite(600, 3).expert_ids)


def test_layers_of_different_sizes_and_tokens_without_experts(tmp_path, capsys):
    ids = np.array([[[0, 1], [1, 255]], [[2, 3], [255, 255]]], np.uint8)
    Trace(ids, 4, experts_of_layer=np.array([2, 4], np.int32), layer_names=("a", "b")).save(tmp_path / "t.npz")
    assert cli.main(["trace", "--show", str(tmp_path / "t.npz"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["load"] == [
        {"name": "a", "max_over_mean": pytest.approx(4 / 3), "busiest": 1, "unused": 0},
        {"name": "b", "max_over_mean": 2.0, "busiest": 2, "unused": 2},
    ]
    assert found["gpus_of_a_token"] == pytest.approx((2 + 1 + 2) / 3)
    assert found["sequences"] is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of MODEL, --from, --generate, --show must be given, got none"),
        (["--generate", "--show", "a.npz"], "got --generate and --show"),
        (["--generate", "--against", "a.npz"], "--against must come with --show"),
        (["--generate", "--output", "a.txt"], "--output must end in .npz, got a.txt"),
        (["--show", "a.npz", "--output", "b.npz"], "--output must not come with --show"),
        (["nowhere"], "MODEL must be the folder of a transformers model, with its config.json, got nowhere"),
        (["--from", "ids.npy"], "--output must be given for a trace of tokens"),
        (["--from", "odd.csv"], "rows layer,expert of odd.csv must be whole numbers"),
        (["--show", "odd.csv"], "odd.csv must be a whole .npz file"),
    ],
)
def test_bad_usage_and_bad_files_are_status_2_and_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.zeros((4, 2, 2), np.int16) + np.arange(2, dtype=np.int16))
    (tmp_path / "odd.csv").write_text("1,x\n")
    assert cli.main(["trace", *argv]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "odd.csv"]


def test_what_is_not_there_is_status_1(tmp_path, capsys):
    assert cli.main(["trace", "--show", str(tmp_path / "none.npz")]) == 1
    assert cli.main(["trace", "--from", str(tmp_path / "none.csv"), "--output", str(tmp_path / "a.npz")]) == 1
    assert capsys.readouterr().err.count("No such file") == 2


def test_a_model_or_text_that_will_not_do(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["trace", str(tmp_path)]) == 2
    assert "MODEL must be a folder that transformers can load" in capsys.readouterr().err
    argv = ["trace", str(folder), "--output", str(tmp_path / "t.npz")]
    assert cli.main([*argv, "--text", str(tmp_path / "none")]) == 2
    assert "--text must be a file that can be read" in capsys.readouterr().err
    (tmp_path / "empty").write_text("")
    assert cli.main([*argv, "--text", str(tmp_path / "empty")]) == 2
    assert "at least one token" in capsys.readouterr().err
    assert not (tmp_path / "t.npz").exists()


def test_showing_loads_no_torch(tmp_path):
    generate(2, 8, 2, 100).save(tmp_path / "t.npz")
    code = "import sys\nfrom headgate import cli\n"
    code += f"assert cli.main(['trace', '--show', {str(tmp_path / 't.npz')!r}]) == 0\nsys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)


def test_the_file_is_one_that_streams(tmp_path):
    assert cli.main(["trace", "--generate", "--tokens", "50", "--output", str(tmp_path / "t.npz")]) == 0
    with TraceFile(tmp_path / "t.npz") as file:
        assert file.shape == (26, 50, 6)
