"""Calls at random against the oracle, a few of `make fuzz`; a fault is found, and repeated by what is printed."""

import re
import shlex

import fuzz
import pytest
import torch
from draws import DRAWS, draw

import condense_kernels as ck
from condense_kernels.testing import same_bits


@pytest.fixture(autouse=True)
def threads_as_before(cpp):
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def failures(capsys, *arguments: str) -> tuple[int, str]:
    status = fuzz.main(list(arguments))
    return status, capsys.readouterr().out


def test_some_calls():
    """With another seed each time, which is printed."""
    assert fuzz.main(["--calls", "150"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "4"])
def test_more_calls(threads):
    assert fuzz.main(["--calls", "2000", "--threads", threads]) == 0


@pytest.mark.parametrize("name", list(DRAWS))
def test_a_call_follows_from_seed_and_index(name):
    draw(7, 3, [name])
    first, again, other = draw(7, 4, [name]), draw(7, 4, [name]), draw(8, 4, [name])
    assert first.words() == again.words() != other.words()
    for value, same in zip(first.tensors().values(), again.tensors().values(), strict=True):
        if value.dtype != torch.uint8:  # a workspace is what it happens to be
            assert bool(same_bits(value, same).all())


@pytest.mark.parametrize("name", ["greedy_select", "dpp_select_varlen", "coverage_select"])
def test_a_wrong_result_is_found_and_repeated(name, capsys, monkeypatch):
    """Of picks in reverse, unless the reference made them."""
    right = getattr(ck, name)

    def reversed_picks(*args, **kwargs):
        picks = right(*args, **kwargs)
        return picks if kwargs.get("backend") == "reference" else picks.flip(-1)

    monkeypatch.setattr(ck, name, reversed_picks)
    status, printed = failures(capsys, "--calls", "60", "--seed", "3", "--operators", name)
    assert status == 1
    assert re.search(rf"call \d+: {name}\(.*float", printed)
    command = shlex.split(re.search(r"python tests/fuzz.py (.*)", printed)[1])
    status, again = failures(capsys, *command)
    assert status == 1
    assert again.splitlines()[1:4] == printed.splitlines()[1:4]
    monkeypatch.undo()
    assert failures(capsys, *command)[0] == 0


def test_an_image_that_reads_its_neighbour_is_found(capsys, monkeypatch):
    """All results are the reference's, but for what an image has beside others."""
    right = ck.coverage_select

    def of_the_batch(c, k, **options):
        return right(c if c.shape[0] < 2 else c.roll(1, 0), k, **options)

    monkeypatch.setattr(ck, "coverage_select", of_the_batch)
    status, printed = failures(capsys, "--calls", "100", "--seed", "1", "--operators", "coverage_select")
    assert status == 1
    assert " alone" in printed


def test_a_refusal_of_another_kind_is_found(capsys, monkeypatch):
    right = ck.merge

    def careless(*args, **kwargs):
        try:
            return right(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise RuntimeError("something is wrong") from error

    monkeypatch.setattr(ck, "merge", careless)
    status, printed = failures(capsys, "--calls", "100", "--seed", "1", "--operators", "merge")
    assert status == 1
    assert "is no TypeError or ValueError: RuntimeError('something is wrong')" in printed


def test_an_interrupt_ends_it_with_a_summary(capsys, monkeypatch):
    def interrupted(self, index):
        if index == 5:
            raise KeyboardInterrupt
        self.calls["merge"] += 1

    monkeypatch.setattr(fuzz.Fuzz, "one", interrupted)
    status, printed = failures(capsys, "--calls", "100", "--seed", "1")
    assert status == 130
    assert "interrupted" in printed and "5 calls in" in printed and "seed 1" in printed
