"""The NumPy binding beside threads, forks and arguments that would read beyond memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import pydiffuse.numpy as pn
from pydiffuse import _host
from pydiffuse._core.rules import RULES

C, U = (np.random.default_rng(i).standard_normal((4, 30_000), np.float32) for i in range(2))
PRELUDE = """
import os, sys, threading
import numpy as np
import pydiffuse.numpy as pn
c = np.random.default_rng(0).standard_normal((4, 300_000), np.float32)
u = c[::-1].copy()
"""


def run(code: str, **environment: str) -> str:
    """What a process of its own prints; it hangs for a minute at most."""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "LD_PRELOAD")}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PLAIN = ([1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 2.0], False)


@pytest.mark.parametrize(
    ("varied", "columns", "word"),
    [
        (np.ones((4, 30)), list(range(8)) * 4, "columns"),  # more than there are places for
        (None, [8], "come together"),
        (np.ones((4, 1)), [], "come together"),
        (np.ones((4, 1)), [9], "no such parameter"),
        (np.ones((4, 1)), [-1], "no such parameter"),
        (np.ones((3, 1)), [8], "shape"),
        (np.ones((4, 1), np.float32), [8], "dtype"),
        (np.ones((4, 1), ">f8"), [8], "dtype"),
        (np.ones((4, 2))[:, :1], [8], "contiguous"),
    ],
)
def test_parameters_per_sample(varied, columns, word):
    with pytest.raises(ValueError, match=word):
        _host.guide([C.copy()], [C, U], None, None, None, RULES["cfg"].code, *PLAIN, varied, columns, 1)


@pytest.mark.parametrize(
    ("out", "preds", "rule", "emit", "word"),
    [
        ([C.copy()], [C], "tcfg", 1, "too few"),
        ([C.copy()], [C, U, U], "tcfg", 1, "too many"),
        ([C.copy()], [C, U], "apg", 1, "too few"),
        ([C.copy()], [C, U], "cfg", 3, "one output"),
        ([C.copy()] * 4, [C, U], "cfg", 15, "one output"),
        ([C.copy()], [C, U], "cfg", 4, "only apg"),
        ([C.copy()[:, 1:]], [C, U], "cfg", 1, "shape"),
        ([C.copy()], [C, U[:3]], "cfg", 1, "shape"),
        ([C.copy()], [np.ones(()), np.ones(())], "cfg", 1, "shape"),
        ([C.astype(">f4")], [C, U], "cfg", 1, "byte order"),
        ([np.broadcast_to(C, C.shape)], [C, U], "cfg", 1, "read-only"),
        ([C.copy()], [C, np.zeros(480_001, np.int8)[1:].view(np.float32).reshape(4, -1)], "cfg", 1, "aligned"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(out, preds, rule, emit, word):
    with pytest.raises(ValueError, match=word):
        _host.guide(out, preds, None, None, None, RULES[rule].code, *PLAIN, None, [], emit)


def test_unknown_rules_and_counts():
    for rule, preds, params, word in (
        (-1, [C, U], PLAIN[0], "rule"),
        (len(RULES), [C, U], PLAIN[0], "rule"),
        (1, [C] * 17, PLAIN[0], "1 to 16"),
        (1, [], PLAIN[0], "1 to 16"),
        (1, [C, U], [1.0] * 25, "too many"),
        (1, [C, U], [1.0] * 8, "too few"),
    ):
        with pytest.raises(ValueError, match=word):
            _host.guide([C.copy()], preds, None, None, None, rule, params, False, None, [], 1)


def test_the_number_of_threads_changes_under_calls():
    expected, before = pn.tcfg(C, U, 7.5), pn.num_threads()
    wrong: list[Exception | str] = []

    def compute() -> None:
        for _ in range(60):
            if not np.array_equal(pn.tcfg(C, U, 7.5), expected):
                wrong.append("other bits")

    threads = [threading.Thread(target=compute) for _ in range(3)]
    try:
        for t in threads:
            t.start()
        n = 0
        while any(t.is_alive() for t in threads):
            pn.set_num_threads(1 + n % 4)
            n += 1
    finally:
        for t in threads:
            t.join()
        pn.set_num_threads(before)
    assert not wrong


FORK = """
pn.set_num_threads(3)
expected = pn.tcfg(c, u, 7.5)
stop = threading.Event()
def busy():
    while not stop.is_set():
        pn.tcfg(c, u, 7.5)
other = threading.Thread(target=busy)
if BUSY:
    other.start()
for _ in range(4):
    child = os.fork()
    if child == 0:
        good = np.array_equal(pn.tcfg(c, u, 7.5), expected) and pn.num_threads() == 3
        if good and os.fork() == 0:  # a child's child, and how a script ends
            sys.exit(0 if np.array_equal(pn.tcfg(c, u, 7.5), expected) else 1)
        good = good and os.wait()[1] == 0
        sys.exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
if BUSY:
    other.join()
assert np.array_equal(pn.tcfg(c, u, 7.5), expected)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("busy", [False, True])
def test_calls_after_a_fork(busy):
    run(f"BUSY = {busy}\n" + FORK)


def test_exit_while_a_thread_computes():
    run("""
def forever():
    while True:
        pn.tcfg(c, u, 7.5)
for _ in range(2):
    threading.Thread(target=forever, daemon=True).start()
pn.tcfg(c, u, 7.5)
""")


def test_threads_at_start():
    asked = "print(pn.num_threads())"
    cpus = sorted(os.sched_getaffinity(0))
    assert run(asked) == str(len(cpus))
    assert run(asked, OMP_NUM_THREADS="3") == "3"
    assert run(asked, OMP_NUM_THREADS="5,2") == "5"
    for nonsense in ("0", "3x"):
        assert run(asked, OMP_NUM_THREADS=nonsense) == str(len(cpus))
    pin = f"os.sched_setaffinity(0, [{cpus[0]}])\n"
    assert run(pin + asked) == "1"
