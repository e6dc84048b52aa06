"""The documents: their examples run, what they link to and name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(ROOT.glob("*.md"))
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_the_readmes_examples_run(example, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "from_pretrained" in example:  # the same on a model that need not be fetched
        transformers = pytest.importorskip("transformers")
        small = transformers.OlmoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, num_experts=8, num_experts_per_tok=2,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(small)
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    try:
        exec(compile(example, "README.md", "exec"), {})
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_there_are_examples():
    assert len(EXAMPLES) == 6


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)", document.read_text())
    assert not [link for link in links if "://" not in link and not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document):
    """Paths such as kernels/native.py or tests/moe; x and op stand for a name of the reader's."""
    paths = re.findall(r"\b((?:kernels|placement|dispatch|moe|bench|tests)/[\w/.-]*[\w])", document.read_text())
    named = [p for p in paths if not re.search(r"(^|[/_])(x|op)\b", p)]
    assert not [p for p in named if not (ROOT / p).exists()]
