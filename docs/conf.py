"""The pages, built by Sphinx: `make docs` writes build/docs/index.html. Nothing is fetched."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import headgate

sys.path.insert(0, str(Path(__file__).parent))  # docstrings.py and options.py, which stand beside this file

project = "Headgate"
author = "the Headgate authors"
version = release = headgate.__version__

extensions = ["sphinx.ext.autodoc", "myst_parser", "sphinx_copybutton", "docstrings", "options"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
smartquotes = False  # `--from` is no dash
suppress_warnings = ["misc.highlighting_failure"]  # what a command printed is highlighted as text

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"Headgate {release}"
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Files of the repository that are a page here, by the page that shows them.
SHOWN = {
    "README.md": "/index.md",
    "ARCHITECTURE.md": "/architecture.md",
    "CONTRIBUTING.md": "/contributing.md",
    "CHANGELOG.md": "/changelog.md",
    "bench/README.md": "/bench.md",
}
for page in Path(__file__).parent.glob("results/*.md"):
    SHOWN[re.findall(r"{include} ../../(\S+)", page.read_text())[0]] = f"/results/{page.name}"


def linked(text: str, folder: Path) -> str:
    """`text`, a page in `folder` (relative to this one), with its links to files that are SHOWN led to their pages."""

    def led(link: re.Match[str]) -> str:
        target = os.path.normpath(Path("docs") / folder / link[1])
        return f"]({SHOWN[target]})" if target in SHOWN else link[0]

    return re.sub(r"\]\(([^)#:\s]+)\)", led, text)


def _on_source(app: Any, name: str, content: list[str]) -> None:
    content[0] = linked(content[0], Path(name).parent)


def _on_include(app: Any, path: Path, parent: str, content: list[str]) -> None:
    content[0] = linked(content[0], path.parent)


def setup(app: Any) -> None:
    app.connect("source-read", _on_source)
    app.connect("include-read", _on_include)
