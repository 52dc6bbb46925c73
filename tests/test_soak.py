"""Five minutes of `make soak`, and that it finds what it is there for: growth, races, and wrong results."""

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import soak
import torch
from rich.console import Console
from soak import Case, Sample, Soak, judge

FLAT = {"resident": 2**30, "files": 9, "threads": 20}


def samples(**slopes: float) -> list[Sample]:
    """An hour, a sample a second, with noise, a slow start, and growth after it by these shares in all."""
    noise = random.Random(0)

    def series(name: str, second: int) -> float:
        start = 0.5 if second < 600 and name == "resident" else 1
        return FLAT[name] * start * (1 + slopes.get(name, 0.0) * second / 3600)

    return [
        Sample(
            float(second),
            int(series("resident", second) * noise.uniform(0.98, 1.02)),
            round(series("files", second)),
            round(series("threads", second)),
        )
        for second in range(3600)
    ]


def test_what_is_flat_after_a_slow_start_is_flat():
    assert judge(samples()) == []


@pytest.mark.parametrize(("what", "share"), [("resident", 0.03), ("files", 0.5), ("threads", 0.6)])
def test_what_grows_is_said(what, share):
    (words,) = judge(samples(**{what: share}))
    assert words.startswith(f"{what}: grew by ")


@pytest.fixture
def console():
    before = torch.get_num_threads()
    yield Console(quiet=True)
    torch.set_num_threads(before)


def soaked(run, expected: torch.Tensor, console: Console, seconds: float = 3.0) -> Soak:
    started = time.monotonic()
    found = Soak(0, [Case("case()", run, (expected,))], started + seconds)
    soak.watch(found, 8, started, [], console)
    return found


def test_scratch_that_threads_share_is_found(console):
    scratch = torch.zeros(1000)

    def run() -> tuple:
        scratch.fill_(threading.get_ident() % 97)
        time.sleep(0)
        return ((scratch - threading.get_ident() % 97).clone(),)

    found = soaked(run, torch.zeros(1000), console, 20.0)
    assert "case()" in found.failures[0] and "entries differ" in found.failures[0]


def test_calls_are_counted_and_none_fails(console):
    found = soaked(lambda: (torch.ones(3),), torch.ones(3), console)
    assert not found.failures
    assert found.calls["case"] > 100


def test_an_interrupt_ends_it_with_a_summary(console, capsys, monkeypatch):
    def interrupted(started: float) -> Sample:
        if time.monotonic() - started > 0.5:
            raise KeyboardInterrupt
        return Sample(0.1, 1, 1, 1)

    monkeypatch.setattr(soak, "sample", interrupted)
    assert soak.main(["--seconds", "60", "--cases", "3", "--threads", "2", "--seed", "4"]) == 130
    printed = capsys.readouterr().out
    assert "interrupted" in printed and "seed 4" in printed and " calls, 0 results differ" in printed


@pytest.mark.slow(minutes=5)
def test_five_minutes(cpp):
    """In a process of its own, whose memory is counted."""
    command = [sys.executable, str(Path(soak.__file__)), "--seconds", "300"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
