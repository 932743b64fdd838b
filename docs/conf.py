"""The documentation as a site: `make docs`. Its pages are the Markdown files of the repository, as they lie there."""

from sanrt.version import __version__

project, author, release = "sanrt", "the authors of sanrt", __version__
copyright = "the authors of sanrt, Apache-2.0"
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md", "training/*.md"]
exclude_patterns = [".*", "build", "dist", "demo", "models", "runs", "site", "src", "tests", "runtime", "kernels", "export"]

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
default_role = "code"  # docstrings mark code with one backtick
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "sanrt"
