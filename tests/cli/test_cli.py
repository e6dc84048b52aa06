"""The command: help with examples, exit status, one line for an error, and what doctor finds."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from headgate import cli
from headgate.bench.gpu import doctor as gpu
from headgate.cli import doctor
from headgate.kernels.chip import H200, Chip

SUBCOMMANDS = (*([name] for name in cli.COMMANDS), *(["bench", kind] for kind in cli.BENCHMARKS))


@pytest.mark.parametrize("command", SUBCOMMANDS, ids=" ".join)
def test_every_subcommand_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert f"headgate {' '.join(command)}" in capsys.readouterr().out.split("example", 1)[1]


def test_help_loads_nothing_heavy(tmp_path):
    code = "import sys\nfrom headgate import cli\ntry:\n  cli.main(['--help'])\nexcept SystemExit:\n  pass\n"
    code += "heavy = {'torch', 'numpy', 'transformers', 'rich', 'matplotlib'}\n"
    code += "sys.exit(','.join(heavy & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["demo", "--steps", "many"], ["bench"]], ids=str)
def test_bad_usage_is_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: headgate" in capsys.readouterr().err


def test_an_error_is_one_line(tmp_path, capsys):
    assert cli.main(["demo", "--text", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("headgate: demo: --text must be a file that can be read, got ")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_status_of_failure_and_of_ctrl_c(monkeypatch, capsys):
    def stop(error):
        def raising(args):
            raise error

        monkeypatch.setattr(doctor, "run", raising)
        return cli.main(["doctor"])

    assert stop(RuntimeError("broken\nin two")) == 1
    assert capsys.readouterr().err == "headgate: broken in two\n"
    assert stop(OSError(28, "No space left on device")) == 1
    assert stop(KeyboardInterrupt()) == 130


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for command, extra in ((["demo"], "hf,plot"), (["train"], "hf"), (["trace", "folder"], "hf")):
        assert cli.main(command) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"headgate: {command[0]}: needs transformers, which is not installed: ")
        assert f"pip install 'headgate[{extra}]'" in said


def options(parser, path=()):
    """path -> the options and arguments of every command below a parser."""
    found = {path: [a.dest for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found |= options(sub, (*path, name))
    return found


def test_the_whole_parser_has_the_options_of_every_command():
    found = options(cli.parser())
    assert set(found) == {(), *map(tuple, SUBCOMMANDS)}
    for path, names in found.items():
        assert len(names) > 3 or path in ((), ("doctor",)), path
    assert {"fold", "layers", "json"} <= set(found[("train",)])
    assert {"gpu_report", "minutes"} <= set(found[("bench",)])
    for path in (("place",), ("bench", "links")):  # the same that a command line of its own gets
        assert options(cli.parser(path))[path] == found[path]


def test_doctor_says_what_runs_here(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]
    assert found["devices"][0] == "cpu"
    assert found["machine"]["cpus"] >= 1
    assert found["machine"]["headgate_form"].split(":")[0] in ("native", "plain")
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert found["machine"]["headgate_form"] in said
    for extra in found["missing_extras"]:
        assert f"pip install 'headgate[{extra}]'" in said


def test_doctor_says_what_a_gpu_would_need(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["doctor"]) == 0
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().out
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "triton              not installed: pip install 'headgate[gpu]'" in said
    assert "TRITON_INTERPRET" not in said
    assert "headgate bench compile" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_doctor_without_a_gpu_says_so_and_what_can_be_done(capsys):
    pytest.importorskip("triton")
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "GPU                 none that torch sees; torch is built" in said
    assert "headgate bench compile builds every kernel" in said
    assert "Symmetric on GPUs   torch sees no CUDA device" in said
    assert "DeepEP on GPUs      device must be a CUDA GPU, got none that torch sees" in said


def test_doctor_describes_a_gpu_and_what_runs_there():
    found = gpu.examine() | {"triton": "3.6.0", "triton_trouble": None, "interpreter": None}
    found["dispatchers"] = {"Symmetric": None, "DeepEP": "deep_ep must be installed"}
    found["devices"] = [
        gpu.describe(H200, 139 * 2**30, None),
        gpu.describe(Chip("Tesla V100", 70, 80, 98304), 16 * 2**30, "Tesla V100 is too old"),
    ]
    said = ["  ".join(row) for row in gpu.rows(found)]
    assert said[:2] == [
        "cuda:0  H200, compute capability 9.0, 139 GiB, 132 multiprocessors",
        "  grouped_ffn, grouped_linear, topk, plan, router_logits: Triton",
    ]
    assert said[2] == "cuda:1  Tesla V100, compute capability 7.0, 16 GiB, 80 multiprocessors"
    assert "  plan: a stable sort in torch" in said
    assert "  because Tesla V100 is too old" in said
    assert "triton  3.6.0" in said
    assert "Symmetric on GPUs  available" in said
    assert "DeepEP on GPUs  deep_ep must be installed" in said
    assert not any("none that torch sees" in line or "bench compile" in line for line in said)


@pytest.mark.parametrize(("version", "bad"), [("3.5.1", True), ("3.6.0", False), ("4.0.0+git", False), ("2.9", True)])
def test_doctor_knows_the_oldest_triton(version, bad):
    assert (gpu.too_old(version) is not None) == bad


@pytest.mark.gpu
def test_doctor_on_a_gpu(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    device = json.loads(capsys.readouterr().out)["gpu"]["devices"][0]
    assert device["name"] == torch.cuda.get_device_name(0)
    assert set(device["forms"].values()) == {"Triton"} or device["why_not_triton"]
    assert cli.main(["doctor"]) == 0
    assert f"compute capability {device['capability']}" in capsys.readouterr().out


def folder(tmp_path, config, name):
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    return str(tmp_path)


SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}  # fmt: skip


def test_doctor_on_a_model_counts_the_calls_that_ran(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    path = folder(tmp_path, transformers.OlmoeConfig(**SMALL), "OlmoeForCausalLM")
    assert cli.main(["doctor", path]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 MoE blocks run through Headgate" in said
    assert "taken    2 x OlmoeExperts: gated silu, fused; 2 calls in a pass of 16 tokens" in said
    assert cli.main(["doctor", path + "/config.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    assert found["complete"] is True
    assert list(found["calls"].values()) == [1, 1]


def test_doctor_on_a_dense_model_fails_with_the_reason(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    dense = transformers.LlamaConfig(**{k: v for k, v in SMALL.items() if "expert" not in k})
    assert cli.main(["doctor", folder(tmp_path, dense, "LlamaForCausalLM")]) == 1
    assert "must hold MoE experts, got a LlamaForCausalLM without any" in capsys.readouterr().out


def test_doctor_swaps_without_running_what_does_not_fit(tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(doctor, "_room", lambda: 1000.0)
    assert cli.main(["doctor", folder(tmp_path, transformers.OlmoeConfig(**SMALL), "OlmoeForCausalLM")]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 MoE blocks can be swapped" in said
    assert "fused" not in said
    assert "not run: it needs" in said


def test_doctor_says_how_much_memory_a_model_takes_and_whether_its_files_are_whole(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SMALL)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    assert cli.main(["doctor", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    rest = sum(p.nbytes for p in model.parameters()) - experts
    auto = found["memory"].pop("auto")
    assert found["memory"] == {"experts_bytes": experts, "rest_bytes": rest, "auto_bytes": experts}
    assert "100% of all" in auto
    files = sorted(tmp_path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert found["checkpoint"] == {
        "kind": "safetensors", "files": len(files), "bytes": size, "experts_bytes": experts,
        "trouble": None, "damaged": False,
    }  # fmt: skip
    assert cli.main(["doctor", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{len(files)} safetensors files of 0.0 MB: headgate.load takes them" in said
    assert f"budget='auto' on a CPU here: {auto.split(':')[0]}" in said
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-1])
    assert cli.main(["doctor", str(tmp_path)]) == 1
    assert f"size of {files[1]} must be" in capsys.readouterr().out
    files[1].unlink()
    assert cli.main(["doctor", str(tmp_path)]) == 1
    assert f"1 are missing: {files[1].name}" in capsys.readouterr().out


def test_doctor_says_of_few_bits_what_they_take(tmp_path, capsys):
    """Rounded experts, not those that they were before."""
    pytest.importorskip("transformers")
    gguf = pytest.importorskip("gguf")
    import gguf_files

    model, path = gguf_files.small("qwen3moe", torch.bfloat16), tmp_path / "m.gguf"
    gguf_files.write(path, "qwen3moe", model, lambda name: "Q8_0" if "exps" in name else "BF16")
    experts = sum(t.data.nbytes for t in gguf.GGUFReader(path).tensors if "exps" in t.name)
    rest = sum(p.nbytes for name, p in model.named_parameters() if ".experts." not in name)
    model.config.save_pretrained(tmp_path / "config")
    for more in ([], ["--config", str(tmp_path / "config")]):
        assert cli.main(["doctor", str(path), "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)["model"]
        assert found["complete"] is True
        assert list(found["calls"].values()) == [1, 1]
        assert found["checkpoint"] == {
            "kind": "GGUF", "files": 1, "bytes": path.stat().st_size, "experts_bytes": experts, "trouble": None,
            "damaged": False,
        }  # fmt: skip
        memory = found["memory"]
        assert (memory["experts_bytes"], memory["rest_bytes"], memory["auto_bytes"]) == (experts, rest, experts)
    assert cli.main(["doctor", str(tmp_path)]) == 0  # a folder with one
    assert "1 GGUF files of" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-1])
    for words, says in (
        ([str(path)], "doctor: MODEL must be a GGUF file that headgate.load takes, got"),
        ([str(path), "--config", "no/folder"], "doctor: --config must be a folder with config.json, got no/folder"),
        ([str(tmp_path / "config"), "--config", str(tmp_path)], "doctor: --config must come with a GGUF file, got"),
        (["--config", str(tmp_path)], "doctor: --config must come with a GGUF file, got no MODEL"),
    ):
        assert cli.main(["doctor", *words]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "never-heard-of"}'])
def test_doctor_on_something_that_is_no_model(tmp_path, capsys, content):
    pytest.importorskip("transformers")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert cli.main(["doctor", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("headgate: doctor: MODEL must be")
    assert said.err.count("\n") == 1


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    code = "import sys\nfrom headgate import cli\nsys.exit(cli.main(['doctor']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert "Traceback" not in done.stderr
