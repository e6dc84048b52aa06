"""The one module that draws: what a picture shows, in a page and in a file, and what is refused."""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from html_page import Page

pytest.importorskip("matplotlib")

from headgate.bench import draw, html

ROOT = Path(__file__).resolve().parents[2]
RATES = {"lru": [0.2, 0.5], "adaptive": [0.3, 0.6], "belady": [0.4, 0.7]}
EYE = np.eye(3) * 4
PICTURES = {
    "bars": partial(draw.bars, values={"a": 0.5, "headgate": 3.0}, ours="headgate", unit="tokens/s"),
    "columns": partial(draw.columns, names=["x", "y"], series={"a": [1.0, None], "b": [2.0, 3.0]}, colours={}),
    "loss": partial(draw.loss, train=[], held_out=[[0, 8.1]], baselines={"uniform": 8.0}, steps=100),
    "heat": partial(draw.heat, values=np.zeros((1, 1)), rows="layer", columns="expert", top=2.0, unit="x"),
    "matrix": partial(draw.matrix, values=EYE, order=[2, 0, 1], rows="<rows>", columns="columns", top=4.0, unit="x"),
    "dumbbells": partial(draw.dumbbells, rows=[("0", 0.0, 0.0)], before="before", after="after"),
    "hit_rates": partial(draw.hit_rates, sizes=[2, 4], rates=RATES, experts=8),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_little_data_are_well_formed(name):
    picture = draw.inline(PICTURES[name], 'a "caption" & more')
    found = Page(picture)
    assert found.open == []
    assert found.loads == []
    assert not re.search("nan|inf", picture)
    assert "<figcaption>a &quot;caption&quot; &amp; more</figcaption>" in picture
    assert not re.search(' id="(figure|axes|patch|text)', picture), "a page may hold many pictures"
    assert not set(draw.PALETTE.values()) & set(re.findall("#[0-9a-f]{6}", picture)), "colours are the page's"
    assert draw.inline(PICTURES[name], 'a "caption" & more') == picture


def numbers(text):
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_bars_are_as_long_as_their_values_and_tell_them():
    picture = draw.inline(partial(draw.bars, values={"a": 10.0, "b": 25.0, "c": 40.0}, ours="b", unit="MB"), "x")
    marks = re.findall(r'<g><title>(\w): ([\d.]+) MB</title>\s*<path d="([^"]+)"[^>]*style="([^"]+)"', picture)
    assert [(name, float(value)) for name, value, *_ in marks] == [("a", 10.0), ("b", 25.0), ("c", 40.0)]
    wide = [max(numbers(path)[::2]) - min(numbers(path)[::2]) for *_, path, _ in marks]
    assert wide == pytest.approx([10 * wide[2] / 40, 25 * wide[2] / 40, wide[2]], rel=1e-4)
    assert ["--accent" in style for *_, style in marks] == [False, True, False]
    assert {"10.0", "25", "40"} <= set(Page(picture).words)


def test_cells_are_as_strong_as_their_values_and_tell_them():
    values = np.array([[0.0, 1.0, 2.0], [5.0, 0.5, 1.5]])
    picture = draw.inline(partial(draw.heat, values=values, rows="layer", columns="GPU", top=2.0, unit="x"), "load")
    cells = re.findall(r'<path [^>]*style="([^"]+)"><title>layer (\d), GPU (\d): ([\d.]+) x</title>', picture)
    told = [(int(i), int(j), float(v)) for _, i, j, v in cells]
    assert told == [(i, j, values[i, j]) for i in (0, 1) for j in range(3)]
    found = [re.search(r"fill-opacity: ([\d.]+)", style) for style, *_ in cells]
    strength = [float(opacity[1]) if opacity else 1.0 for opacity in found]
    assert strength == pytest.approx([0.05 + 0.95 * min(v, 2.0) / 2 for v in values.ravel()], abs=0.01)


def test_rows_of_a_matrix_come_in_the_order_asked_for():
    values = np.arange(9.0).reshape(3, 3)
    picture = partial(
        draw.matrix, values=values, order=[2, 0, 1], rows="r", columns="c", top=9.0, unit="x", names=[7, 8, 9]
    )
    told = [numbers(title.replace("→", " "))[:3] for title in Page(draw.inline(picture, "x")).titles]
    assert told == [[row, 7 + j, values[row, j]] for row in (2, 0, 1) for j in range(3)]


def test_a_matrix_of_very_many_cells_is_an_image():
    big, order = np.ones((128, 128)), range(128)
    picture = draw.inline(partial(draw.matrix, values=big, order=order, rows="r", columns="c", top=1, unit="x"), "x")
    assert "data:image/png" in picture
    assert len(picture) < 100_000


def test_words_at_the_end_of_lines_do_not_stand_on_one_another():
    assert draw.apart([1.0, 1.01, 3.0], 0.5) == [1.0, 1.5, 3.0]


def test_files_are_what_their_names_say(tmp_path):
    def fill(figure):
        PICTURES["hit_rates"](figure.subplots())

    for name in ("a.png", "a.svg"):
        draw.write(tmp_path / name, 600, 400, fill)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "belady" in Page((tmp_path / "a.svg").read_text()).words


@pytest.mark.parametrize(
    ("name", "says"),
    [("c.pdf", "x: --plot must end in .png or .svg, got c.pdf"), ("/nowhere/c.png", "x: the folder of /nowhere/c.png")],
)
def test_a_name_that_will_not_do_is_refused(name, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        draw.check(Path(name), "x")


def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(draw.machine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"x: --plot: needs matplotlib, .* pip install 'headgate\[plot\]'"):
        draw.check(tmp_path / "c.png", "x")
    with pytest.raises(RuntimeError, match="needs matplotlib"):
        draw.inline(PICTURES["bars"], "x")


def test_a_page_knows_every_colour_of_a_picture():
    page = html.page("t", "h", "l", "")
    for name, colour in draw.PALETTE.items():
        assert f"--{name}:{colour};" in page
        assert f"--{name}:" in html.DARK
    assert Page(page).open == []


def modules(path: Path):
    """(module, level) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level
            yield from ((f"{node.module or ''}.{a.name}".strip("."), node.level) for a in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, 0) for a in node.names)


def library():
    return [f for part in ("bench", "cli") for f in sorted((ROOT / part).rglob("*.py"))]


@pytest.mark.parametrize(("package", "only"), [("matplotlib", "bench/draw.py"), ("rich", "bench/screen.py")])
def test_one_module_draws_and_one_shows(package, only):
    roots = {str(f.relative_to(ROOT)): {m.split(".")[0] for m, up in modules(f) if not up} for f in library()}
    assert {name for name, found in roots.items() if package in found} == {only}


def test_what_measures_knows_no_command():
    def reaches(path: Path) -> bool:
        top = len(path.relative_to(ROOT).parts)  # dots that reach headgate itself
        return any(m.startswith("headgate.cli") or (up == top and m.split(".")[0] == "cli") for m, up in modules(path))

    found = {
        path.relative_to(ROOT) for path in library() if path.relative_to(ROOT).parts[0] == "bench" and reaches(path)
    }
    assert not found, "bench/ must not import cli/"
