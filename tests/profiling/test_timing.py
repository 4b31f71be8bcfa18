"""Clocks, turns and percentiles: their structure. Durations themselves depend on the machine and
are not asserted.
"""

import time

import pytest
import torch
from fake_queue import Queue

from effattn.profiling import timing
from effattn.profiling.timing import Clock, Gpu, Taken, alternate, pace, percentiles, turn

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


# a GPU that is not there


def steps(queue: Queue, host: float, *kernels: float):
    """Kernels, one after the other, and what Python does before each."""

    def call():
        for seconds in kernels:
            queue.host(host)
            queue.launch(seconds)

    return call


@pytest.mark.parametrize("host", [0.0, 106e-6, 5e-3, 25e-3])
def test_a_gpus_time_has_no_python_in_it(host):
    """62 us of decoding are 62 us, whatever Python took to launch them; that is told beside."""
    queue = Queue()
    taken = Clock("cuda", gpu=queue)(steps(queue, host, 62e-6))
    assert taken == pytest.approx(62e-6, abs=1e-9)
    assert taken.covered
    assert taken.host == pytest.approx(host + 5e-6)


def test_gaps_between_kernels_are_not_timed():
    queue = Queue()
    taken = Clock("cuda", gpu=queue)(steps(queue, 200e-6, 30e-6, 20e-6, 12e-6))
    assert taken == pytest.approx(62e-6, abs=1e-9)
    assert taken.host > 600e-6


def test_events_alone_would_have_timed_python():
    """What the clock is there for: the same queue, without a wait."""
    queue = Queue()
    before = queue.mark()
    steps(queue, 106e-6, 62e-6)()
    assert before.elapsed_time(queue.mark()) / 1000 > 160e-6


def test_a_wait_that_is_too_short_is_noticed_and_remembered():
    queue, undone = Queue(), []
    call, other = steps(queue, 5e-3, 62e-6), steps(queue, 0.0, 10e-6)
    clock = Clock("cuda", gpu=queue)
    clock(call, undo=lambda: undone.append(len(queue.waits)))
    assert len(undone) == 1  # once more, behind a wait of twice what the host took
    assert queue.waits[-1] == pytest.approx(2 * 5.005e-3)
    queue.waits.clear()
    clock(call)
    clock(other)  # for which the first wait suffices
    assert queue.waits == [pytest.approx(2 * 5.005e-3), Clock.WAIT]


def test_a_slower_gpu_waits_longer_and_tells_the_same():
    queue = Queue(rate=4.0)
    assert Clock("cuda", gpu=queue)(steps(queue, 1e-3, 62e-6)) == pytest.approx(62e-6, abs=1e-9)


def test_a_call_that_waits_for_the_device_says_so():
    queue = Queue()

    def call():
        queue.launch(40e-6)
        queue.mark().synchronize()  # `.item()`
        queue.host(1e-3)
        queue.launch(22e-6)

    clock = Clock("cuda", gpu=queue)
    taken = clock(call)
    assert not taken.covered
    assert taken > 1e-3
    queue.waits.clear()
    assert not clock(call).covered
    assert queue.waits == []  # which would help nothing


def test_more_launches_than_a_queue_holds_are_not_covered():
    queue = Queue(most=100)
    assert not Clock("cuda", gpu=queue)(steps(queue, 0.0, *[10e-6] * 300)).covered
    assert Clock("cuda", gpu=queue)(steps(queue, 0.0, *[10e-6] * 80)).covered


def test_the_clock_rate_is_raised_once():
    queue = Queue()
    clock = Clock("cuda", gpu=queue)
    clock(call := steps(queue, 0.0, 62e-6))
    assert sum(queue.waits) >= Clock.WARM
    queue.waits.clear()
    clock(call)
    assert queue.waits == [Clock.WAIT]


def test_percentiles_of_a_gpu_have_the_hosts_time():
    times = [Taken(62e-6, host) for host in (1e-4, 3e-4, 2e-4)]
    found = percentiles(times)
    assert found["p50"] == 62e-6
    assert found["host_p50"] == 2e-4
    assert found["covered"]
    assert pace(found) == 2e-4  # launching takes longer
    assert pace(percentiles([Taken(3e-4, 2e-4)])) == 3e-4
    assert not percentiles([*times, Taken(1.0, 1.0, False)])["covered"]
    plain = percentiles([Taken(0.5)])
    assert plain == {"p20": 0.5, "p50": 0.5, "p80": 0.5, "rounds": 1}
    assert pace(plain) == 0.5


def test_what_a_gpu_is_asked_is_what_torch_has():
    """Names and arguments; what they do needs a GPU."""
    assert callable(torch.cuda._sleep)
    for name in ("query", "synchronize", "elapsed_time", "record"):
        assert callable(getattr(torch.cuda.Event, name))
    assert Gpu(torch.device("cuda")).now() <= time.perf_counter()


@pytest.mark.gpu
def test_a_gpu_times_a_sleep_beside_a_busy_host():
    def call():
        time.sleep(5e-3)
        torch.cuda._sleep(100_000)

    def alone():
        torch.cuda._sleep(100_000)

    clock = Clock("cuda")
    clock(alone)
    busy, idle = clock(call), clock(alone)
    assert busy.covered
    assert busy.host >= 5e-3
    assert busy == pytest.approx(idle, rel=0.3)
