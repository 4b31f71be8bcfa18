"""Adding to transformers without importing it: what it does not know yet is added when it is
imported, whoever imports it.

    import effattn                                              # nothing is loaded
    from transformers import AutoModelForCausalLM               # now it is added
    model = AutoModelForCausalLM.from_pretrained("out")         # whatever effattn.save wrote

`import effattn` has to stay light, and transformers takes seconds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# a module of transformers -> ours, whose `register()` adds to it
ADDED = {
    "transformers.models.auto.configuration_auto": "effattn.plugin.config",
    "transformers.modeling_utils": "effattn.plugin.loading",
}


class _Finder(MetaPathFinder):
    """Finds the modules in ADDED as Python does, and adds ours behind them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in ADDED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_add(module: ModuleType) -> None:
            run(module)
            _add(fullname)

        # on this loader alone, which each import makes anew
        spec.loader.exec_module = run_and_add  # type: ignore[method-assign]
        return spec


def _add(name: str) -> None:
    importlib.import_module(ADDED[name]).register()


def install() -> None:
    """Adds to what is imported already, and to the rest when it is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in ADDED:
        if name in sys.modules:
            _add(name)
