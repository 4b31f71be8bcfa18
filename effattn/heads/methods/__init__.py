"""The ways to merge key/value heads, one file each. Importing this package registers them all: a
new file is found by itself.

    METHODS["optimal"](heads)      # heads: one group of a layer, as `Heads`; a `Merged`
"""

from __future__ import annotations

import importlib
import pkgutil

from effattn.heads.methods.base import REGISTERED, Method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

METHODS: dict[str, Method] = dict(sorted(REGISTERED.items(), key=lambda item: item[1].rank))
