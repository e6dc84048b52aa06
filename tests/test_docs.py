"""The documents: examples run and print what is shown, commands parse, what is linked to and named is there."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import operator
import re
import shlex
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import headgate
from headgate import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
GUIDES = [ROOT / "README.md", *DOCS]
DOCUMENTS = sorted({*ROOT.glob("*.md"), ROOT / "bench" / "README.md", *DOCS})
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def named(paths):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def examples(page: Path) -> list[tuple[str, str | None]]:
    """The Python blocks of a page, each with what it prints: the `text` block that follows at once, or None."""
    source = page.read_text()
    blocks = list(FENCE.finditer(source))
    found = []
    for block, after in zip_longest(blocks, blocks[1:]):
        if block[1] == "python":
            shown = after and after[1] == "text" and not source[block.end() : after.start()].strip()
            found.append((block[2], after[2] if shown else None))
    return found


@pytest.fixture(scope="module")
def small_model():
    """What stands in for a model that would have to be fetched."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = transformers.OlmoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(small).eval()


@pytest.mark.parametrize("page", named(p for p in GUIDES if examples(p)))
def test_examples_run_and_print_what_is_shown(page, small_model, monkeypatch, tmp_path):
    """One page is one program, from its first block to its last."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    load = staticmethod(lambda name, **options: copy.deepcopy(small_model))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": page.stem}
    try:
        for code, shown in examples(page):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(page), "exec"), names)
            if shown is not None:
                assert printed.getvalue().rstrip() == shown.rstrip()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_there_are_examples():
    assert len(examples(ROOT / "README.md")) >= 6
    assert sum(len(examples(page)) for page in DOCS) >= 20


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks that call `headgate`, without what stands before the call."""
    shell = [block[2] for block in FENCE.finditer(page.read_text()) if block[1] in ("", "sh")]
    lines = "\n".join(shell).replace("\\\n", " ").splitlines()
    calls = [re.match(r"(?:[A-Z_]+=\S+ +|torchrun .*? )*headgate (.*)", line) for line in lines]
    return [call[1] for call in calls if call]


@pytest.mark.parametrize("page", named(p for p in [*GUIDES, ROOT / "bench" / "README.md"] if commands(p)))
def test_commands_parse(page):
    for command in commands(page):
        argv = shlex.split(command, comments=True)
        try:
            cli.parser(argv).parse_args(argv)
        except SystemExit as stop:
            pytest.fail(f"headgate {command}: argparse ends with status {stop.code}")


def test_there_are_commands():
    assert sum(len(commands(page)) for page in GUIDES) >= 20


@pytest.mark.parametrize("document", named(DOCUMENTS))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", document.read_text()))
    assert not [link for link in links if "://" not in link and not (document.parent / link).exists()]


@pytest.mark.parametrize("document", named(DOCUMENTS))
def test_files_that_are_named_exist(document):
    """Paths such as kernels/native.py or tests/moe; x and op stand for a name of the reader's."""
    text = re.sub(r"\]\([^)]*\)", "", document.read_text())  # links are looked at above
    start = r"(?<![\w/.-])(?:kernels|placement|dispatch|moe|bench|tests|cli|docs)/"
    paths = re.findall(rf"({start}[\w/.-]*[\w])", text)
    here = (ROOT, document.parent)
    named = [p for p in paths if not re.search(r"(^|[/_])(x|op)\b", p)]
    assert not [p for p in named if not any((folder / p).exists() for folder in here)]


def test_what_other_libraries_flags_are_called_here_is_there():
    """Tables of coming.md: each `name=` is a parameter of something public, each `headgate.name` resolves."""
    page = (ROOT / "docs" / "coming.md").read_text()
    rows = [row.split("|")[-2] for row in page.splitlines() if row.startswith("| ")]
    code = [c for row in rows for c in re.findall(r"`([^`]+)`", row)]
    takers = [headgate.MoE, headgate.MoE.forward, headgate.Experts, headgate.Capacity, headgate.Fold,
              headgate.parallelize, headgate.grouped_ffn, *headgate.moe.ROUTERS.values()]  # fmt: skip
    known = {name for taker in takers for name in inspect.signature(taker).parameters}
    known |= {"edp", "ep", "etp", "dp", "cp", "tp"}
    arguments = {name for c in code for name in re.findall(r"\b(\w+)=", c)}
    assert len(arguments) > 35
    assert not arguments - known
    names = {name for c in code for name in re.findall(r"\bheadgate\.([\w.]+)", c)}
    for name in names:
        operator.attrgetter(name)(headgate)
    layer = headgate.MoE(8, 4, 4, 2, router="sigmoid", capacity=1.0)
    layer(torch.randn(3, 8))
    for name in ("aux_losses", "last_routing.counts", "last_overflow", "aux_scale", "router.expert_bias"):
        assert f"`{name}`" in page
        assert operator.attrgetter(name)(layer) is not None


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_messages_are_those_of_the_code():
    """Each heading of errors.md is a message; `...` stands for a value. Its words stand in the source in this order."""
    page = (ROOT / "docs" / "errors.md").read_text()
    messages = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(messages) >= 20
    folders = ("kernels", "placement", "dispatch", "moe", "cli", "bench")
    sources = [joined(f.read_text()) for folder in folders for f in sorted((ROOT / folder).rglob("*.py"))]
    for message in messages:
        parts = [part.strip() for part in message.split("...")]
        holders = [source for source in sources if max(parts, key=len) in source]
        pattern = re.compile(".{0,80}?".join(map(re.escape, parts)))
        assert any(pattern.search(source) for source in holders), message


NAMES = """
import sys
import headgate
for name in sys.argv[1:]:
    found = headgate
    try:
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    except AttributeError as error:
        print(name, error)
"""


def test_names_that_are_printed_resolve_after_a_plain_import():
    """`headgate.placement.rebalance` and the like, in one fresh process."""
    pages = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *DOCS]
    names = {
        name for page in pages for name in re.findall(r"(?<![\w/.(])headgate(?:\.[A-Za-z_]\w*)+", page.read_text())
    } - {"headgate.json"}  # a file
    assert len(names) >= 50
    done = subprocess.run([sys.executable, "-c", NAMES, *sorted(names)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def joined(source: str) -> str:
    """Source whose string literals, where they go on in the next line, are one."""
    return re.sub(r"\"\s*\n\s*f?\"", "", source)


def test_docstrings_become_pages():
    """docs/docstrings.py: names, indented lines, examples and running text, each in its way."""
    path = ROOT / "docs" / "docstrings.py"
    spec = importlib.util.spec_from_file_location("docstrings_of_the_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "Sums `a_b` * c_\nover all.\n\nrows   [R, D]\n       of rows\n\nso:\n    y = x\n\n>>> f(1)\n2"
    assert module.convert(text.splitlines()) == [
        *("Sums ``a_b`` \\* c\\_", "over all.", ""),
        *("``rows``", "    [R, D]", "    of rows", ""),
        *("so:", "", "::", "", "        y = x", "", ""),
        *(">>> f(1)", "2", ""),
    ]
