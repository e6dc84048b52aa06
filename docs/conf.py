"""The pages, built by Sphinx: `make docs` writes build/docs/index.html. Nothing is fetched."""

from __future__ import annotations

import sys
from pathlib import Path

import headgate

sys.path.insert(0, str(Path(__file__).parent))  # docstrings.py and options.py, which stand beside this file

project = "Headgate"
author = "the Headgate authors"
version = release = headgate.__version__

extensions = ["sphinx.ext.autodoc", "myst_parser", "sphinx_copybutton", "docstrings", "options"]
exclude_patterns = ["README.md"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
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
