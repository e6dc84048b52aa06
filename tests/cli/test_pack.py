"""`headgate pack`: from a folder to a file that headgate.load takes; what is odd, and what is interrupted."""

from __future__ import annotations

import signal

import pytest
import torch
from signalled import STATUS, Process

from headgate import cli

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that takes a while to pack."""
    config = transformers.OlmoeConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_experts=16, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    made = tmp_path_factory.mktemp("olmoe")
    transformers.OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(made)
    return made


def test_from_a_folder_to_a_file(folder, tmp_path, capsys):
    import headgate

    output = tmp_path / "q.experts"
    assert cli.main(["pack", str(folder), str(output), "--formats", "int4", "--max-memory", "1GiB"]) == 0
    said = capsys.readouterr()
    assert said.out == f"wrote {output}, {output.stat().st_size / 1e9:.3g} GB\n"
    assert "32/32  experts" in said.err
    headgate.load(folder, "50%", disk=output, formats="int4")[1].close()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--formats", "int3"], "--formats: invalid choice: 'int3'"),
        (["--max-memory", "25%"], '--max-memory: must be bytes of at least 1 ("2GiB", "500 MB", 4096), got \'25%\''),
        (["--max-memory", "9" * 5000], "--max-memory: must be bytes"),
        (["--max-memory", "2"], "pack: max_memory must be at least 1,572,864 bytes for an expert of"),
    ],
)
def test_an_odd_value_is_refused_in_one_line(folder, tmp_path, capsys, words, says):
    try:
        status = cli.main(["pack", str(folder), str(tmp_path / "q.experts"), *words])
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_leaves_nothing_behind(folder, tmp_path, number):
    process = Process(["pack", str(folder), "q.experts", "--formats", "mxfp4"], tmp_path)
    process.wait_until(lambda: bool([*tmp_path.glob(".q.experts-*")]))
    process.process.send_signal(number)
    ended = process.ended()
    assert ended.status == STATUS[number], ended
    assert ended.said.splitlines()[-1] == f"headgate: {'interrupted' if number == signal.SIGINT else 'terminated'}"
    assert not [*tmp_path.glob("*q.experts*")]
