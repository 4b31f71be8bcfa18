"""The terminal: consoles, errors of one line, signals, and stages with a progress bar."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from time import monotonic

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from effattn.recipes.options import GOES_ON

QUIET = 5.0  # seconds of a stage without a terminal before its progress is told
LONG = 30.0  # seconds that a stage will still take, by its first steps, for that to be told at once

console = Console()
errors = Console(stderr=True)


def console_of(width: int | None) -> Console:
    """Where a report is printed: no terminal says how wide a log is, whose lines may be long."""
    return console if width is None or console.is_terminal else Console(width=width)


class Signalled(KeyboardInterrupt):
    """SIGTERM, or the terminal is gone: what Ctrl-C does, with the exit code that the signal
    has.
    """

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number


def one_line_errors(command: Callable) -> Callable:
    """Turns what users can cause (bad values, missing files, a full disk, Ctrl-C, SIGTERM) into one
    line and an exit code. What a stopped command says is the note that `when_stopped` left."""

    @wraps(command)
    def guarded(*args, **kwargs):
        from safetensors import SafetensorError

        # transformers imports bitsandbytes, which on some processors advises a package that we have
        # no use for.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        try:
            with _orderly_signals():
                return command(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError, RuntimeError, SafetensorError) as error:
            if os.environ.get("EFFATTN_DEBUG"):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            errors.print(
                f"error: {' '.join(lines[:2]) or type(error).__name__}",
                style="bold red",
                markup=False,
                soft_wrap=True,
            )
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            errors.print(
                (getattr(stop, "__notes__", None) or [GOES_ON])[0], soft_wrap=True, markup=False
            )
            raise typer.Exit(getattr(stop, "code", 130)) from None

    return guarded


@contextmanager
def when_stopped(say: Callable[[], str]):
    """What is said when the body is stopped, instead of `GOES_ON`."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(say())
        raise


@contextmanager
def _orderly_signals():
    """While the body runs, SIGTERM and SIGHUP are raised as `Signalled`, so that what is half done
    is cleaned up.

    Signals that somebody handles, or ignores (nohup), stay as they are.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one does not interrupt the cleaning up
    raise Signalled(number)


class Lines:
    """A stage's progress where there is no terminal: an estimate after the first steps of `QUIET`
    seconds, if that says `LONG` or more, and a line at each quarter, with how long it took and what
    is left by that measure; none in a stage that has not lasted `QUIET` seconds."""

    def __init__(self, text: str):
        self.text, self.begun, self.said = text, monotonic(), -1

    def __call__(self, done: int, total: int) -> None:
        quarter = 4 * done // total if total else 0
        if quarter <= self.said or quarter >= 4 or not done:
            return
        seconds = monotonic() - self.begun
        left = seconds * (total - done) / done
        if quarter or seconds >= QUIET:  # a first step of many is mostly warming up
            self.said = quarter
        if quarter and seconds >= QUIET:
            self._say(f"{25 * quarter} % after {_clock(seconds)}, about {_clock(left)} left")
        elif not quarter and seconds >= QUIET and left >= LONG:
            self._say(f"about {_clock(left)} left, by the first {100 * done / total:.2g} %")

    def _say(self, what: str) -> None:
        errors.print(f"{self.text}: {what}", soft_wrap=True, highlight=False)


def _clock(seconds: float) -> str:
    """ "0:42", "1:05:00"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Show:
    """Stages with a progress bar on a terminal, and with lines elsewhere."""

    @contextmanager
    def stage(self, text: str):
        """A progress bar, as a context that gives (done, total) -> None."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        if not errors.is_terminal:
            errors.print(f"{text} ...", soft_wrap=True)
            yield Lines(text)
            return
        with Progress(*columns, console=errors) as bar:
            task = bar.add_task(text, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
            bar.update(task, total=1, completed=1)


def quiet_libraries() -> None:
    """Keeps the loading bars and notices of torch, transformers and the hub out of our output."""
    # Read when torch is loaded. Its allocator warns, after memory was measured once, of every
    # thousandth block that is older than the measurement.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import transformers
    from huggingface_hub.utils import logging as hub

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hub.set_verbosity_error()  # each of its retries is a warning; that none helped is our error
