"""What mkdocs needs to know of the package's layout, for the API pages.

Public names: `::: effattn.swap` becomes the module that defines it, since the package imports its
public names at their first use, from a table of strings that tools which read the source do not
follow. Folders: five at the top level are one import package, which they do not see either."""

import importlib
import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parents[1]
INSIDE = ("kernels", "prune", "quant", "recipes")  # folders that are `effattn.kernels` and so on
NAME = re.compile(r"^::: (effattn(?:\.\w+)*)\.(\w+)(\n    options:)?$", re.MULTILINE)
_made: list[Path] = []


@event_priority(100)  # before mkdocstrings looks at its paths
def on_config(config):
    """The package as it is installed, made of links."""
    tree = Path(tempfile.mkdtemp(prefix="effattn-docs-"))
    _made.append(tree)
    (tree / "effattn").mkdir()
    for path in [*(ROOT / "effattn").iterdir(), *(ROOT / name for name in INSIDE)]:
        (tree / "effattn" / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(tree)]
    return config


def on_page_markdown(markdown, **_):
    """A page's `:::` lines with the modules that define the names; headings keep the names that a
    user writes.
    """
    return NAME.sub(_defined, markdown)


def on_post_build(**_):
    """Takes the links away."""
    while _made:
        shutil.rmtree(_made.pop())


def _defined(found):
    package, name = found[1], found[2]
    try:
        table = getattr(importlib.import_module(package), "_FUNCTIONS", {})
    except ModuleNotFoundError:  # a class in a module: said as it is
        table = {}
    public = f"{package}.{name}"
    where = f"{table[name]}.{name}" if name in table else public
    return f"::: {where}\n    options:\n      heading: {public}\n      toc_label: {name}"
