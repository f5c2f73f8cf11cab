"""Sphinx with MyST; the pages are Markdown, the reference is read from the docstrings."""

import aftermax

project = "aftermax"
author = "The aftermax authors"
version = release = aftermax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["deflist", "dollarmath"]
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"

html_theme = "furo"
html_title = "aftermax"
