"""The package is what the design says: one import name, nothing patched, installable, empty of
surprises.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import effattn

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "effattn": "effattn",
    "kernels": "effattn.kernels",
    "prune": "effattn.prune",
    "quant": "effattn.quant",
    "recipes": "effattn.recipes",
}


def python(code: str, cwd: Path = ROOT, executable: str = sys.executable) -> str:
    done = subprocess.run(
        [executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_every_package_folder_is_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = set()
    for top, name in FOLDERS.items():
        for init in (ROOT / top).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / top).parts
            found.add(".".join((name, *inside)))
    assert listed == found


def test_our_kernels_folder_and_transformers_live_together():
    """From the root, `import kernels` is our folder, which transformers takes for the Hub's package
    of that name.
    """
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""
    out = python(
        "import transformers, kernels, effattn.kernels.flash as f; print(kernels.__file__); "
        "print(f.__file__)"
    )
    assert out.splitlines() == [
        str(ROOT / "kernels" / "__init__.py"),
        str(ROOT / "kernels" / "flash" / "__init__.py"),
    ]


def test_import_patches_nothing_and_loads_no_model_code():
    code = (
        "import sys, effattn; print([m for m in ('transformers', 'torch', 'triton', "
        "'matplotlib') if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_public_names_resolve_and_no_module_shadows_one():
    for name in effattn.__all__:
        assert getattr(effattn, name) is not None
        if name in effattn._FUNCTIONS:
            assert not (ROOT / "effattn" / f"{name}.py").exists()
            assert not (ROOT / "effattn" / name).exists()
    with pytest.raises(AttributeError, match="no attribute 'swapp'"):
        _ = effattn.swapp


def test_everything_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, effattn, effattn.recipes.cli\n"
        "from effattn.heads import gqa\n"
        "from effattn.recipes import convert_gqa, flow\n"
        "attn = effattn.backend('dense')\n"
        "q = torch.randn(1, 2, 4, 8)\n"
        "print(tuple(attn(q, q, q, causal=True).shape))"
    )
    assert python(code) == "(1, 2, 4, 8)"


def test_the_wheel_carries_everything_and_runs_alone(tmp_path):
    """Built from the tree, unpacked into a folder of its own, used with the source tree out of
    reach.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ROOT,
    ]
    done = subprocess.run(
        [*map(str, command), "--quiet", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "effattn/py.typed" in archive.namelist()
        tops = {name.split("/")[0] for name in archive.namelist()}
        archive.extractall(tmp_path / "site")
    assert {top for top in tops if not top.endswith(".dist-info")} == {"effattn"}
    # -S: no site-packages' .pth files, so the editable install cannot be found; torch and the rest
    # come after.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'site')!r}]; sys.path += {packages!r}\n"
        "import effattn, effattn.kernels.flash, effattn.recipes\n"
        "from effattn.heads.report import ConversionReport\n"
        "model, tokenizer = effattn.embedded.load()\n"
        "print(effattn.__file__, effattn.kernels.__file__, model.config.num_key_value_heads)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    site = tmp_path / "site" / "effattn"
    assert done.stdout.split() == [
        str(site / "__init__.py"),
        str(site / "kernels" / "__init__.py"),
        "8",
    ]
