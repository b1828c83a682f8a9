"""Loops in parts on torch's threads: all of them, at once, and the result of one thread to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from pyrocell.distributions import threads
from pyrocell.distributions.threads import in_parts
from pyrocell.nn.normaliser import largest_and_sum
from tests.distributions.families import CASES, Case, parameters_of, sparse_counts

MANY = 2**30  # numbers, so that any loop is worth its start
needs_openmp = pytest.mark.skipif(threads._region() is None, reason="torch's OpenMP was not found")


@pytest.fixture(params=[1, 2, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def parts_of(n: int, n_numbers: int = MANY) -> list[tuple[int, int]]:
    parts: list[tuple[int, int]] = []
    in_parts(lambda start, stop: parts.append((start, stop)), n, n_numbers=n_numbers)
    return sorted(parts)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 100])
def test_parts_make_up_the_whole(n, n_threads):
    covered = [i for start, stop in parts_of(n) for i in range(start, stop)]
    assert covered == list(range(n))


@needs_openmp
def test_parts_run_at_once_on_threads_of_their_own(two_threads):
    both = threading.Barrier(2, timeout=60)
    seen = set()

    def work(start, stop):
        both.wait()  # one after the other, they would wait in vain
        seen.add((start, stop, threading.get_ident()))

    in_parts(work, 10, n_numbers=MANY)
    assert {part[:2] for part in seen} == {(0, 5), (5, 10)}
    assert len({part[2] for part in seen}) == 2


def test_few_numbers_are_not_worth_the_start(two_threads):
    assert parts_of(10, n_numbers=1000) == [(0, 10)]


@needs_openmp
def test_a_failure_is_raised_when_all_have_ended(two_threads):
    ended = []

    def work(start, stop):
        if start == 0:
            raise KeyboardInterrupt
        ended.append(stop)

    with pytest.raises(KeyboardInterrupt):
        in_parts(work, 10, n_numbers=MANY)
    assert ended == [10]


@pytest.mark.skipif(sys.platform != "linux", reason="looked for on Linux alone")
def test_openmp_is_found_where_torch_has_it():
    assert (threads._region() is not None) == ("backend: OpenMP" in torch.__config__.parallel_info())


@pytest.mark.parametrize("problem", [OSError, AttributeError])
def test_without_openmp_one_thread_does_it_all(problem, two_threads, monkeypatch):
    def library(_):
        raise problem

    monkeypatch.setattr(threads.ctypes, "CDLL", library)
    monkeypatch.setattr(threads, "_region", threads._region.__wrapped__)
    assert parts_of(10) == [(0, 10)]


FORK = """
import os, torch
from pyrocell.distributions.threads import in_parts
torch.set_num_threads(2)
in_parts(lambda start, stop: None, 10, n_numbers=2**30)
child = os.fork()
if child == 0:
    parts = []
    in_parts(lambda start, stop: parts.append((start, stop)), 10, n_numbers=2**30)
    os._exit(0 if parts == [(0, 10)] else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_works_alone():
    """The threads of its parent are gone: to wait for them would take for ever."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


LAST = """
import torch
from pyrocell.distributions.threads import in_parts
torch.set_num_threads(2)
class Last:
    def __del__(self):
        parts = []
        self.in_parts(lambda start, stop: parts.append((start, stop)), 10, n_numbers=2**30)
        print(parts)
last = Last()
last.in_parts = in_parts
last.in_parts(lambda start, stop: None, 10, n_numbers=2**30)
"""


def test_an_interpreter_that_ends_works_alone():
    """Other threads can no longer have Python's lock, and would wait for it for ever."""
    told = subprocess.run([sys.executable, "-c", LAST], check=True, timeout=60, capture_output=True)
    assert told.stdout.decode().strip() == "[(0, 10)]"


@pytest.mark.parametrize("others_ran", [False, True])
def test_an_interrupt_before_the_first_line_is_raised_all_the_same(others_ran, two_threads, monkeypatch):
    """Python may act on Ctrl-C where ctypes calls a function: that is printed, and the function does not run."""

    def region(body, data, n, flags):
        if others_ran:
            other = threading.Thread(target=body, args=(data,))
            other.start()
            other.join()

    monkeypatch.setattr(threads, "_region", lambda: region)
    with pytest.raises(KeyboardInterrupt):
        parts_of(10)


def test_a_team_of_one_does_all_parts(two_threads, monkeypatch):
    monkeypatch.setattr(threads, "_region", lambda: lambda body, data, n, flags: body(data))
    assert parts_of(10) == [(0, 5), (5, 10)]


def scores(case: Case, leading: tuple[int, ...]) -> list[torch.Tensor]:
    parameters = parameters_of(case, torch.float32, (*leading, 64, 200))
    x = sparse_counts()
    rows = case.build(parameters).to_event(1).log_prob(x)
    elements = case.build(parameters).log_prob(x)
    return [rows, elements, *torch.autograd.grad(rows.sum() + elements.sum(), parameters)]


@needs_openmp
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("leading", [(), (3,)], ids=str)
def test_scores_are_those_of_one_thread(case, leading, monkeypatch, two_threads):
    monkeypatch.setattr(threads, "_WORTH", 1)
    found = scores(case, leading)
    monkeypatch.setattr(threads, "_region", lambda: None)
    for one, other in zip(found, scores(case, leading), strict=True):
        assert torch.equal(one, other)


@needs_openmp
def test_normalisers_are_those_of_one_thread(monkeypatch, two_threads):
    x = torch.randn(301, 200, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(threads, "_WORTH", 1)
    found = largest_and_sum(x)
    monkeypatch.setattr(threads, "_region", lambda: None)
    for one, other in zip(found, largest_and_sum(x), strict=True):
        assert torch.equal(one, other)
