"""Settings of Sphinx: `make docs` builds the site in docs/_build/html."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

project = "StaQ for Stable-Baselines3"
author = "The sb3-staq developers"
copyright = author
release = re.search(r'__version__ = "(.*)"', (ROOT / "sb3_staq" / "__init__.py").read_text())[1]
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx-mathjax-offline",  # the site shows formulas without a network, too
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
smartquotes = False  # values of arguments can be copied from the text

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "linkify"]
myst_heading_anchors = 3
myst_linkify_fuzzy_links = False  # names of files are no addresses

autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
autodoc_typehints = "none"  # the signature and the parameters say it
# The types of SB3 and Gymnasium are not documented here
nitpicky = False

html_theme = "furo"
html_title = "StaQ for SB3"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#00588a", "color-brand-content": "#00588a"},
    "dark_css_variables": {"color-brand-primary": "#6cb8e6", "color-brand-content": "#6cb8e6"},
    "navigation_with_keys": True,
}
copybutton_exclude = ".linenos, .gp, .go"
