"""Command lines that make no sense: one line that says why, a documented status, and no work begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import odd_lines
import pytest

from headgate import cli
from headgate.bench import arguments

NINES = "9" * 31
KNOWN = {
    "cache t.npz --budget inf": "--budget must be bytes",
    "cache t.npz --budget inf%": "--budget must be a share",
    "cache t.npz --budget 8GiB --expert-bytes 0": "--expert-bytes must be at least 1",
    "cache FIFO.npz --slots 2": "must be a file, got the pipe or device 'FIFO.npz'",
    "place t.npz --nodes 1 --gpus-per-node 10000000000000 --compare": "--gpus-per-node: must be a whole number",
    "place t.npz --nodes 65536 --gpus-per-node 2 --compare": "nodes * gpus_per_node must be at most 65536, got 131072",
    "place t.npz --nodes 1 --gpus-per-node 2 --output FOLDER": "outputs must be files, got the folder FOLDER",
    "pack config q.experts --max-memory 0": "--max-memory: must be bytes of at least 1",
    "pack config BIG": "pack: output must be a new file or an experts file, got BIG",
    "pack config FOLDER": "OUT: must be a file in a folder that can be written to, got 'FOLDER'",
    "convert dense": "the following arguments are required: OUT",
    "convert config made": "dense must be a dense model, got one of type olmoe with 4 experts already",
    "convert FIFO made": "must be a folder with config.json and safetensors files",
    "convert dense BIG": "convert: output must be a new or empty folder, got BIG",
    "convert dense made --shards 4": "options must be those of 'copy' (noise), got shards",
    "convert dense made --top-k 3 --experts 2": "top_k must be at most experts (2), got 3",
    "convert dense made --layers 3-1": "--layers: must be numbers of layers such as 1,3,5-9, got '3-1'",
    "convert dense made --text BIG": "convert: MODEL must have a tokenizer for --text",
    "pack FIFO q.experts": "must be a folder with config.json and safetensors files",
    "doctor size": "MODEL must be a config that transformers can read",
    "doctor nested": "MODEL must be a config that transformers can read",
    "train --experts 100000000 --text BIG": "must fit into memory",
    "train --batch 2000000000 --text BIG": "must fit into memory",
    "train --checkpoint BIG --text BIG": "--checkpoint must be a folder, got the file BIG",
    "train --text FIFO": "the text must have at least",
    f"train --steps 1 --text {'x' * 9999}": "File name too long",
    "demo --text /dev/zero": "--text must be a file that can be read, got /dev/zero (a device)",
    "trace --generate --tokens 2000000000 --output big.npz": "--tokens must fit into memory",
    "bench links --at-most-nodes 1 --ranks-per-node 1": "at_most_nodes must hold top_k (8) experts",
    "bench links --at-most-nodes -1": "at_most_nodes must hold top_k (8) experts",
    "bench links --bytes 1e300 1e300": "times must be finite",
    f"bench quantized --intermediate {NINES}": "--intermediate: must be a whole number",
    "bench quantized --experts 2000000000": "must fit into memory",
    "bench quantized --threads -1": "--threads: must be a whole number from 1",
    "bench --gpu-report --device ../x": "--device: must be cpu, cuda or cuda:N, got '../x'",
    "bench placement MISSING --effort 1e30": "--effort: must be above 0 and at most 1000000",
    "bench dispatch --timeout 1e300": "--timeout must be positive and below 1e6",
    "bench roofline --tflops -1": "--tflops must be above 0, got -1",
    "bench roofline --tokens 1 --json FOLDER": "--json: must be a file in a folder that can be written to",
    "bench compile --processes 2000000000": "--processes: must be at most 4096",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder that the lines name things in."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("odd")
    odd_lines.prepare(folder)
    Path("BIG").write_bytes(os.urandom(20_000))
    for name, text in (("nested", "[" * 100_000), ("size", json.dumps(odd_lines.CONFIG | {"hidden_size": "x"}))):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    yield folder
    os.chdir(before)


@pytest.mark.parametrize(("line", "says"), KNOWN.items(), ids=[line[:60] for line in KNOWN])
def test_a_line_that_was_taken_wrongly(here, line, says, capsys):
    there = set(here.iterdir())
    try:
        status = cli.main(line.split())
    except SystemExit as stop:  # argparse
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2
    assert says in said.splitlines()[-1]
    assert len(said.splitlines()[-1]) < 1000
    assert set(here.iterdir()) == there


def test_links_of_a_router_that_takes_few_nodes(capsys):
    """More nodes than experts reach, some with none of a token's."""
    assert cli.main(["bench", "links", "--at-most-nodes", "4", "--ranks-per-node", "4"]) == 0
    assert "hierarchical" in capsys.readouterr().out


def test_links_of_one_rank(capsys):
    assert cli.main(["bench", "links", "--ranks", "1", "--tokens", "16"]) == 0
    assert "1.00x" in capsys.readouterr().out


def test_an_error_that_no_check_foresees_is_one_line(monkeypatch, capsys):
    from headgate.cli import doctor

    for error in (MemoryError("Unable to allocate 9 GiB"), OverflowError("too large"), RecursionError("too deep")):

        def run(args, error=error):
            raise error

        monkeypatch.setattr(doctor, "run", run)
        assert cli.main(["doctor"]) == 1
        said = capsys.readouterr().err
        assert said.startswith("headgate: gave up: ")
        assert str(error) in said
        assert said.count("\n") == 1


def test_a_long_value_is_not_said_in_full(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "links", "--ranks", "9" * 100_000])
    assert len(capsys.readouterr().err) < 3000


def faults(folder: Path, count: int, seed: int) -> list[str]:
    command = [sys.executable, "-P", odd_lines.__file__, str(folder), str(count), str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, errors="replace")
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if line.startswith("FAULT")]


def test_a_hundred_odd_lines(tmp_path):
    assert faults(tmp_path, 100, seed=1) == []


@pytest.mark.slow
def test_a_thousand_odd_lines(tmp_path):
    assert faults(tmp_path, 1000, seed=2) == []


def test_every_option_gets_odd_values():
    """A thousand lines reach every option of every command."""
    lines = odd_lines.lines(1000, 2)
    reached = {(name.split(" ")[0], word) for name, line in lines for word in line if word.startswith("--")}
    for command, action in odd_lines.parsers(cli.parser()):
        left_out = {word for words in odd_lines.LONG.values() for word in words}
        for option in {*action.option_strings[-1:]} - left_out:
            assert (command.split(" ")[0], option) in reached


def test_a_device_is_an_output_wherever_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments.os, "access", lambda path, mode: str(path) == "/dev/null")  # as for who is not root
    assert arguments.output("/dev/null") == "/dev/null"
    with pytest.raises(ArgumentTypeError, match="must be a file in a folder that can be written to"):
        arguments.output(str(tmp_path / "x.json"))
