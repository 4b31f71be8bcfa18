"""Where a measurement was made: device, versions, threads. Every report ends with it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers


def device_name() -> str:
    """The accelerator's name if there is one, otherwise the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor_name()


def processor_name() -> str:
    """The CPU's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def module_version(name: str) -> str | None:
    """`name.__version__`, or None where the module cannot be imported (its distribution may have
    another name).
    """
    try:
        return getattr(importlib.import_module(name), "__version__", None)
    except ImportError:
        return None


def package_version(name: str) -> str | None:
    """The installed distribution's version, or None when it runs from a source tree."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict:
    """JSON-able: device, versions (null where missing), CPU threads that torch uses, platform, UTC
    date (ISO).
    """
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": module_version("triton"),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "effattn": package_version("effattn"),
    }
