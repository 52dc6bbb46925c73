"""Calls at random, held to the oracle of the tests: `make fuzz`. Described in docs/load.md.

    python tests/fuzz.py --calls 100000 --seed 7
    python tests/fuzz.py --seed 7 --only 4711       # that call alone, as a failure says

What each call is held to is in drawn.py. Of some calls the rest of the contract is looked at, too: an image alone has
the bits that it has in its batch, the number of threads changes nothing, and wrong arguments are a TypeError or a
ValueError that names one.
"""

import argparse
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from drawn import Call, Dice
from draws import DRAWS, draw
from rich.console import Console
from rich.progress import track

from condense_kernels.testing import assert_same_bits

MOST_SHOWN = 10  # failures


def check_alone(call: Call, result: tuple, dice: Dice) -> None:
    batch = result[0].shape[0]
    if not call.packed and batch > 1:
        b = dice.random.randrange(batch)
        assert_same_bits(call.of_image(b), tuple(part[b : b + 1] for part in result), f"image {b} alone")


def check_threads(call: Call, result: tuple, dice: Dice) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(dice.one(*(n for n in (1, 2, 3, 5) if n != before)))
    try:
        arguments = {
            name: value for name, value in call.arguments.items() if name != "workspace"
        }  # its size would differ
        again = Call(call.operator, arguments, call.check, function=call.function)
        assert_same_bits(again.run(), result, f"{torch.get_num_threads()} threads instead of {before}")
    finally:
        torch.set_num_threads(before)


def check_refusal(call: Call, dice: Dice) -> None:
    """One argument is made wrong. Whether that is refused is for test_errors.py to say; how, is asked here."""
    name = dice.random.choice(sorted(call.tensors()))
    value = call.arguments[name]
    values = (value[..., :-1], value[None], value.to(torch.complex64), value.to_sparse(), value.to("meta"))
    wrong = dice.one(*values, value.tolist(), None)
    try:
        call.run(**{name: wrong})
    except (TypeError, ValueError, RuntimeError) as error:
        if call.function is not None:
            return  # a raw operator: torch's own words come first
        of_values = re.match(r"\w+: expected values in", str(error))  # of a tensor, which only the kernel sees
        if isinstance(error, RuntimeError) and not of_values:
            raise AssertionError(f"{name} made wrong is no TypeError or ValueError: {error!r}") from error
        if not re.match(r"[a-z_]\w*[:, ]|.*missing", str(error)):
            raise AssertionError(f"an error that names no argument: {error}") from error


@dataclass
class Fuzz:
    seed: int
    names: list[str]
    shared: bool  # with other threads, which may then not change the number of torch's
    calls: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)  # of these two
    interrupted: bool = False

    def one(self, index: int) -> None:
        call = draw(self.seed, index, self.names)
        dice = Dice(f"{self.seed}/{index}/further")
        try:
            result = call.run()
            call.check(result)
            if dice.chance(0.2):
                check_alone(call, result, dice)
            if dice.chance(0.2) and not self.shared:
                check_threads(call, result, dice)
            if dice.chance(0.1):
                check_refusal(call, dice)
        except Exception as error:  # whatever it is, it is a finding
            self.failures.append(
                f"call {index}: {call.words()}\n  {type(error).__name__}: {error}\n  {self.repeat(index)}"
            )
        with self.lock:
            self.calls[call.operator] += 1

    def repeat(self, index: int) -> str:
        some = f" --operators {' '.join(self.names)}" if self.names != list(DRAWS) else ""
        return f"python tests/fuzz.py --seed {self.seed} --only {index}{some}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000, help="how many (100000)")
    parser.add_argument("--seed", type=int, help="repeats a run; the time without it, printed")
    parser.add_argument("--only", type=int, metavar="I", help="call I of the run alone")
    parser.add_argument("--threads", type=int, default=1, help="of Python, that call at once (1)")
    parser.add_argument("--operators", nargs="+", choices=list(DRAWS), default=list(DRAWS), metavar="NAME")
    return parser


def indices(options: argparse.Namespace, fuzz: Fuzz, console: Console) -> Iterator[int]:
    wanted = range(options.calls) if options.only is None else [options.only]
    for index in track(wanted, "calls", console=console, transient=True, disable=not console.is_terminal):
        if len(fuzz.failures) >= MOST_SHOWN:
            return
        yield index


def run(fuzz: Fuzz, options: argparse.Namespace, console: Console) -> None:
    """Each thread takes the next call when it is through with one, so that all stop soon after enough has failed."""
    waiting, lock = indices(options, fuzz, console), threading.Lock()

    def work() -> None:
        while not fuzz.interrupted:
            with lock:
                index = next(waiting, None)
            if index is None:
                return
            fuzz.one(index)

    if options.threads == 1:
        return work()
    with ThreadPoolExecutor(options.threads) as pool:
        try:
            for future in [pool.submit(work) for _ in range(options.threads)]:
                future.result()
        except KeyboardInterrupt:
            fuzz.interrupted = True
            raise


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"seed {seed}, {options.calls if options.only is None else 1} calls", flush=True)
    torch.set_num_threads(1)  # small calls are what most are; check_threads has others
    fuzz, started = Fuzz(seed, options.operators, options.threads > 1), time.monotonic()
    console = Console(stderr=True)
    try:
        run(fuzz, options, console)
    except KeyboardInterrupt:
        fuzz.interrupted = True
        print("interrupted: what follows is of the calls until then")
    print("\n".join(fuzz.failures[:MOST_SHOWN]), end="\n" if fuzz.failures else "")
    done = sum(fuzz.calls.values())
    print(", ".join(f"{name} {count}" for name, count in sorted(fuzz.calls.items())))
    print(f"{done} calls in {time.monotonic() - started:.0f} s, {len(fuzz.failures)} failed, seed {seed}")
    return 130 if fuzz.interrupted else int(bool(fuzz.failures))


if __name__ == "__main__":
    sys.exit(main())
