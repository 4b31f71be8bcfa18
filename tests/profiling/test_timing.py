"""Clocks, turns and percentiles: their structure. Durations themselves depend on the machine and
are not asserted.
"""

import time

import pytest
import torch

from effattn.profiling import timing
from effattn.profiling.timing import Clock, alternate, percentiles, turn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_percentiles_are_torchs():
    times = torch.rand(23, dtype=torch.float64)
    got = percentiles(times.tolist())
    for name, share in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8)):
        assert got[name] == pytest.approx(float(torch.quantile(times, share)))
    assert got["rounds"] == 23
    assert percentiles([0.5]) == {"p20": 0.5, "p50": 0.5, "p80": 0.5, "rounds": 1}
    with pytest.raises(ValueError, match="seconds: got none"):
        percentiles([])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_turns_are_fair(count):
    """Over a whole cycle everyone stands at each place equally often, and is as often before as
    after each other.
    """
    names = [str(i) for i in range(count)]
    orders = [turn(names, number) for number in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    assert orders[1] == orders[0][::-1]
    for name in names:
        assert sorted(order.index(name) for order in orders) == sorted(2 * list(range(count)))
        for other in names:
            if other != name:
                assert sum(order.index(name) < order.index(other) for order in orders) == count


def test_alternate_interleaves_and_keeps_to_its_bounds():
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "abc"}

    def clock(call):
        call()
        return float(len(ran))

    times = alternate(calls, clock, seconds=0, least=4, warmup=2)
    assert ran[:6] == list("abcabc")  # warm-up, not in the times
    assert ran[6:] == [name for number in range(4) for name in turn(list("abc"), number)]
    assert {name: len(one) for name, one in times.items()} == dict.fromkeys("abc", 4)
    every = sorted(one for some in times.values() for one in some)
    assert every == [float(i) for i in range(7, 19)]  # each call's own time, none twice
    assert len(alternate(calls, clock, seconds=60, most=5)["a"]) == 5


def test_alternate_ends_when_the_time_is_over():
    clock = Clock("cpu")
    start = time.perf_counter()
    times = alternate(
        {"sleep": lambda: time.sleep(0.01)},
        clock,
        seconds=0.1,
        least=1,
        most=10**6,
    )
    assert 0.1 <= time.perf_counter() - start < 5
    assert all(one >= 0.01 for one in times["sleep"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(calls={}), "calls: got none"),
        (dict(least=0), "least, most: got 0 and 50"),
        (dict(least=5, most=4), "least, most: got 5 and 4"),
        (dict(seconds=-1), "seconds, warmup: got -1"),
    ],
)
def test_alternate_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        alternate(**{"calls": {"a": int}, "clock": Clock("cpu"), "seconds": 0, **arguments})


@pytest.mark.parametrize("flush", [False, True])
def test_clock(flush):
    """It calls once, and its seconds lie within those around it; a flush comes before the call and
    is not timed.
    """
    clock, calls = Clock(DEVICE, flush), []
    start = time.perf_counter()
    seconds = clock(lambda: calls.append(time.perf_counter()) or time.sleep(0.01))
    assert len(calls) == 1
    assert 0.0099 <= seconds <= time.perf_counter() - start
    if flush:
        assert clock._flushed.nbytes >= 2 * timing.last_level_cache(torch.device(DEVICE))
        clock._flushed.fill_(1)
        seen = []
        clock(lambda: seen.append(int(clock._flushed.sum())))
        assert seen == [0]


def test_clock_refuses_other_devices():
    with pytest.raises(ValueError, match="device: got 'meta', valid are 'cpu' and 'cuda'"):
        Clock("meta")


def test_the_last_level_cache_is_the_largest(tmp_path, monkeypatch):
    for index, size in enumerate(("32K", "1024K", "32M", "junk")):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(size + "\n")
    monkeypatch.setattr(timing, "Path", lambda _: tmp_path)
    assert timing.last_level_cache(torch.device("cpu")) == 32 * 2**20
    monkeypatch.setattr(timing, "Path", lambda _: tmp_path / "none")
    assert timing.last_level_cache(torch.device("cpu")) == timing.UNKNOWN_CACHE
