"""How Sphinx makes the site: `make docs`, from the pages of docs/, results and docstrings.

The source directory is the repository, so that pages link to each other, to results and to code as
they do where the repository is browsed.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends"), str(ROOT / "conformance")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "torch")

import metaopt as mo  # noqa: E402

project = "metaopt"
author = copyright = "The metaopt authors"
release = version = mo.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
    "sphinxcontrib.mermaid",
]
default_role = "code"
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "backends/README.md",
    "benchmarks/README.md",
    "benchmarks/algoperf/README.md",
    "benchmarks/protocol.md",
    "benchmarks/results/*.md",
    "docs/**",
]
exclude_patterns = ["docs/_build/**", "docs/gallery/*.py", "docs/gallery/*.rst"]

myst_enable_extensions = ["dollarmath", "amsmath", "attrs_block"]
myst_fence_as_directive = ["math", "mermaid"]
myst_heading_anchors = 4
# pages of results are found from the page that has their summary
suppress_warnings = ["toc.not_included"]

numpydoc_class_members_toctree = False
numpydoc_show_class_members = False
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning", "transformers"]  # of callbacks
autodoc_typehints = "none"

sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "docs" / "gallery"),
    "gallery_dirs": str(ROOT / "docs" / "_gallery"),
    "filename_pattern": r".*\.py",
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "abort_on_example_error": True,
    "image_scrapers": ("matplotlib",),
    "remove_config_comments": True,
}

html_theme = "furo"
html_title = "metaopt"
html_baseurl = ""
html_extra_path = ["_site"]  # what sends readers of the first page to it
html_copy_source = False
html_show_sourcelink = False
