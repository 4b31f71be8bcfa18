"""The backends, one file each. Importing this package registers them all: a new file is found by
itself.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
