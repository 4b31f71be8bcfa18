"""With this folder and the checkout on PYTHONPATH, `import effattn.kernels` and the others work in
every process without an install: pyproject.toml's package-dir, as a finder."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


class Checkout(importlib.abc.MetaPathFinder):
    """Finds the packages whose folder has another name than they."""

    def __init__(self, root: Path):
        settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        folders = settings["tool"]["setuptools"]["package-dir"]
        self.folders = {name: root / folder for name, folder in folders.items() if "." in name}

    def find_spec(self, name, path=None, target=None):
        """Of such a package; None for all others."""
        if (folder := self.folders.get(name)) is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if not any(isinstance(finder, Checkout) for finder in sys.meta_path):
    sys.meta_path.insert(0, Checkout(ROOT))
