"""Sphinx configuration: ``python -m sphinx -W -b html docs docs/_build/html``."""

import sys
from pathlib import Path

import distillzoo

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "distillzoo"
author = "The distillzoo authors"
copyright = author
version = release = distillzoo.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "method_pages", "refusals", "reproduction"]
exclude_patterns = ["_build", "_ext"]
highlight_language = "none"  # blocks name their language; the others are output

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "alabaster"
html_theme_options = {
    "description": "Knowledge distillation for image classification in PyTorch",
    "fixed_sidebar": True,
    "page_width": "1080px",
    "sidebar_width": "250px",
}
