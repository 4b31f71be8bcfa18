"""Device peaks: measured once, kept whole, read back; what cannot be known is null."""

import dataclasses
import json
import math
import warnings

import pytest
import torch

from effattn.errors import Unsupported
from effattn.profiling import device
from effattn.profiling.device import Peaks, peaks


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Small sizes, short times, a cache of its own."""
    monkeypatch.setenv("EFFATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(device, "_sizes", lambda _: [2**20])
    monkeypatch.setattr(device, "BUDGET", 0.001)
    monkeypatch.setattr(device, "LONGEST", 0.0)
    monkeypatch.setattr(device, "SMALLEST", 32)
    return tmp_path / "peaks"


def test_peaks_are_measured_once_and_kept(quick):
    told = []
    first = peaks("cpu", progress=told.append)
    assert told[:3] == ["copy bandwidth", "read bandwidth", "write bandwidth"]
    assert told[-1] == "launches"
    (file,) = quick.iterdir()  # no temporary file is left
    assert json.loads(file.read_text())["device"] == first.device
    assert first.kind == "cpu"
    assert first.threads == torch.get_num_threads()
    assert first.versions["torch"] == torch.__version__
    assert set(first.matmul_flops) == {"float64", "float32", "bfloat16", "float16", "int8"}
    assert first.matmul_flops["float32"] > 0
    for value in (
        first.copy_bytes_per_s,
        first.read_bytes_per_s,
        first.write_bytes_per_s,
        first.launch_seconds,
    ):
        assert value > 0
        assert math.isfinite(value)
    told.clear()
    assert peaks("cpu", progress=told.append) == first
    assert not told  # from the file
    again = peaks("cpu", refresh=True, progress=told.append)
    assert told
    assert peaks("cpu") == again


def test_peaks_survive_json(quick):
    found = peaks("cpu")
    assert Peaks.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "{",
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: text.replace('"kind": "cpu"', '"kind": "abacus"'),
        lambda text: text.replace('"copy_bytes_per_s": ', '"copy_bytes_per_s": -'),
        lambda text: text.replace('"read_bytes_per_s": ', '"read_bytes_per_s": "fast", "x": '),
        lambda text: text.replace('"launch_seconds": ', '"launch_seconds": NaN, "was": '),
    ],
)
def test_a_corrupt_or_older_file_is_measured_again(quick, change):
    peaks("cpu")
    (file,) = quick.iterdir()
    file.write_text(change(file.read_text()))
    told = []
    found = peaks("cpu", progress=told.append)
    assert told
    assert (
        Peaks.from_dict({k: v for k, v in json.loads(file.read_text()).items() if k != "format"})
        == found
    )


def test_a_folder_that_cannot_be_written_is_a_warning(quick):
    quick.parent.joinpath("peaks").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="not kept"):
        found = peaks("cpu")
    assert found.copy_bytes_per_s > 0


def test_each_number_of_threads_has_its_own_file(quick, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peaks("cpu")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 96)
        assert peaks("cpu").threads == 96
    assert len(list(quick.iterdir())) == 2


def test_what_cannot_be_measured_is_null(quick, monkeypatch):
    def cannot(*_):
        raise RuntimeError('"addmm_impl_cpu_" not implemented for this dtype')

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(torch, "mm", cannot)
    monkeypatch.delattr(torch, "_int_mm")
    monkeypatch.setattr(torch, "ones_like", too_large)
    found = peaks("cpu", refresh=True)
    assert set(found.matmul_flops.values()) == {None}
    assert found.copy_bytes_per_s is None
    assert found.read_bytes_per_s > 0
    assert Peaks.from_dict(found.to_dict()) == found


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EFFATTN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert device.cache_folder() == tmp_path / "home" / ".cache" / "effattn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert device.cache_folder() == tmp_path / "xdg" / "effattn"
    monkeypatch.setenv("EFFATTN_CACHE", str(tmp_path / "own"))
    assert device.cache_folder() == tmp_path / "own"


def test_kinds(monkeypatch):
    assert device._kind(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.version, "hip", None)
    assert device._kind(torch.device("cuda")) == "cuda"
    monkeypatch.setattr(torch.version, "hip", "6.4")  # ROCm calls its devices "cuda"
    assert device._kind(torch.device("cuda")) == "rocm"


def test_unknown_devices():
    with pytest.raises(ValueError, match=r"device: got 'cudda' \(did you mean 'cuda'\?\)"):
        peaks("cudda")
    with pytest.raises(ValueError, match="device: got 'meta'"):
        peaks(torch.device("meta"))
    count = torch.cuda.device_count()
    with pytest.raises(Unsupported, match=f"device: got 'cuda:{count}', torch sees {count} GPUs"):
        peaks(f"cuda:{count}")


def test_from_dict_says_what_is_wrong():
    values = {field.name: None for field in dataclasses.fields(Peaks)}
    with pytest.raises(ValueError, match="peaks: got list"):
        Peaks.from_dict([])
    with pytest.raises(ValueError, match="peaks: kind: got None"):
        Peaks.from_dict(values)
    values |= {"kind": "cuda", "matmul_flops": {"float32": True}, "versions": {}}
    with pytest.raises(ValueError, match="peaks: float32: got True"):
        Peaks.from_dict(values)


@pytest.mark.gpu
def test_peaks_of_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFATTN_CACHE", str(tmp_path))
    found = peaks("cuda")
    assert found.kind in ("cuda", "rocm")
    assert found.threads is None
    # an accelerator's memory, and not a cache or an empty call
    assert found.read_bytes_per_s > 1e11
    assert found.matmul_flops["bfloat16"] > found.matmul_flops["float32"] > 0
