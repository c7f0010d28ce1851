"""The NumPy binding beside threads, forks and arguments that would read beyond memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import pydiffuse.numpy as pn
from pydiffuse import _host, plans
from pydiffuse._core.rules import RULES

C, U = (np.random.default_rng(i).standard_normal((4, 30_000), np.float32) for i in range(2))
PRELUDE = """
import os, sys, threading
import numpy as np
import pydiffuse.numpy as pn
c = np.random.default_rng(0).standard_normal((4, 300_000), np.float32)
u = c[::-1].copy()
"""


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


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


X = np.ones((2, 3, 4, 4), np.float32)
LEVELS = np.full((2, 4), 0.5, np.float32)
GRID, STEP = [3, 1, 4, 4, 1, 2, 2], (0, 0, 0, 0, 1, 3)
MIX = ["patch_step", [X.copy()], None, [X, X], LEVELS, LEVELS, None, None, None, GRID, STEP, 1.0, 1.0]
SELECT = [
    "select_patches", np.empty((4, 2), int), np.empty((4, 3), int), None, None, C[:, :5].copy(), 2, None, None
]  # fmt: skip
TOKENS, ROWS = C[:, :5].copy(), np.zeros(4, np.int32)
MODULATE = [TOKENS.copy(), None, TOKENS, None, np.ones((2, 2, 5), np.float32), ROWS, 1, 1e-6, False]
IDS = np.zeros((2, 3), np.int32)
GATHER = [np.empty((2, 3, 16), np.float32), X.reshape(2, 3, 16), IDS]
SCATTER = [GATHER[1].copy(), GATHER[1], GATHER[0], IDS, None]

S, ORDER, OFFSETS = (
    np.ones((2, 5, 3), np.float32),
    np.arange(5, dtype=np.int32)[None],
    np.array([0, 2, 5], np.int32),
)
CONV = [S.copy(), S, np.ones((3, 2), np.float32), None, ORDER, OFFSETS, True]
A = np.ones((1, 3, 4), np.float32)
WEIGHTS, STATES = np.ones((2, 1, 1, 5, 4), np.float32), np.ones((2, 2, 1, 3, 4), np.float32)
SCAN = [
    S.copy(),
    STATES.copy(),
    S,
    S[:, None],
    A,
    WEIGHTS,
    WEIGHTS,
    None,
    S,
    None,
    STATES,
    ORDER,
    OFFSETS,
    True,
]

Q, PLAN = np.ones((2, 2, 39, 8), np.float32), plans.frames(3, 13, 1).packed_array
ORDERED = plans.sliding_tile((8, 6), (4, 3), (4, 3)).packed_array
ATTEND = [Q.copy(), np.empty((2, 2, 39), np.float32), Q, Q, Q, None, 0.1, PLAN]


def changed(a, place, value):
    a = a.copy()
    a[place] = value
    return a


@pytest.mark.parametrize("packed", [PLAN, ORDERED, plans.local(39, 5).packed_array])
def test_damaged_plans(packed):
    """Every number of a plan changed, by little and by much: refused, or a plan of other tiles."""
    q = np.ones((1, 1, 48 if packed is ORDERED else 39, 8), np.float32)
    refused = 0
    for i in range(len(packed)):
        for value in (-1, 0, 1, 2**31 - 1, -(2**31), packed[i] + 1, packed[i] ^ 64):
            if not -(2**31) <= value < 2**31:
                continue
            try:
                _host.tile_attention(q.copy(), None, q, q, q, None, 0.1, changed(packed, i, value))
            except ValueError:
                refused += 1
    assert refused > len(packed)
    for n in (0, 5, 11, 12, 13, len(packed) - 1):
        with pytest.raises(ValueError):
            _host.tile_attention(q.copy(), None, q, q, q, None, 0.1, packed[:n].copy())


@pytest.mark.parametrize(
    ("function", "usual", "place", "wrong"),
    [
        ("tile_attention", ATTEND, 0, Q[:1].copy()),
        ("tile_attention", ATTEND, 0, read_only(Q)),
        ("tile_attention", ATTEND, 1, np.empty((2, 2, 38), np.float32)),
        ("tile_attention", ATTEND, 2, Q[..., :4].copy()),
        ("tile_attention", ATTEND, 2, Q[:, :, :38].copy()),
        ("tile_attention", ATTEND, 3, Q.astype(np.float16)),
        ("tile_attention", ATTEND, 3, Q[:, :1].copy()),
        ("tile_attention", ATTEND, 4, Q[:, :, ::-1]),
        ("tile_attention", ATTEND, 4, Q.repeat(2, -1)[..., ::2]),
        ("tile_attention", ATTEND, 5, np.ones(3, np.float32)),
        ("tile_attention", ATTEND, 7, ORDERED),
        ("tile_attention", ATTEND, 7, PLAN.astype(np.int64)),
        ("causal_conv1d", CONV, 0, S[:1].copy()),
        ("causal_conv1d", CONV, 0, read_only(S)),
        ("causal_conv1d", CONV, 1, S[:, ::-1]),
        ("causal_conv1d", CONV, 1, np.ones((2, 5, 3, 2), np.float32)[..., 0]),
        ("causal_conv1d", CONV, 2, np.ones((2, 2), np.float32)),
        ("causal_conv1d", CONV, 2, np.ones((3, 9), np.float32)),
        ("causal_conv1d", CONV, 3, np.ones(2, np.float32)),
        ("causal_conv1d", CONV, 4, ORDER + 1),
        ("causal_conv1d", CONV, 4, ORDER - 1),
        ("causal_conv1d", CONV, 4, ORDER[:, :4]),
        ("causal_conv1d", CONV, 5, np.array([0, 6], np.int32)),
        ("causal_conv1d", CONV, 5, np.array([0, 7, 5], np.int32)),
        ("causal_conv1d", CONV, 5, np.array([0], np.int32)),
        ("selective_scan", SCAN, 0, S.astype(np.float32)[:, :4].copy()),
        ("selective_scan", SCAN, 1, STATES[:, :1].copy()),
        ("selective_scan", SCAN, 2, S[:, :, :2].copy()),
        ("selective_scan", SCAN, 3, S[:, None, :, :2].copy()),
        ("selective_scan", SCAN, 4, np.ones((1, 2, 4), np.float32)),
        ("selective_scan", SCAN, 4, np.ones((2, 3, 4), np.float32)),
        ("selective_scan", SCAN, 5, WEIGHTS[..., :3]),
        ("selective_scan", SCAN, 5, np.ones((2, 1, 2, 5, 4), np.float32)),
        ("selective_scan", SCAN, 6, np.ones((1, 3, 3), np.float32)),
        ("selective_scan", SCAN, 7, np.ones((1, 2), np.float32)),
        ("selective_scan", SCAN, 10, STATES[:, :1].copy()),
        ("selective_scan", SCAN, 11, ORDER + 1),
        ("selective_scan", SCAN, 12, OFFSETS + 1),
        ("mix_patches", MIX, 1, [X[:1].copy()]),
        ("mix_patches", MIX, 1, [X.copy(), X.copy()]),
        ("mix_patches", MIX, 2, np.empty((2, 3), np.float32)),
        ("mix_patches", MIX, 3, [X, X[..., :2]]),
        ("mix_patches", MIX, 3, [X]),
        ("mix_patches", MIX, 3, []),
        ("mix_patches", MIX, 4, LEVELS[:, :3]),
        ("mix_patches", MIX, 4, LEVELS + 1),
        ("mix_patches", MIX, 4, LEVELS.astype(np.float64)),
        ("mix_patches", MIX, 5, None),
        ("mix_patches", MIX, 7, np.ones((2, 3), bool)),
        ("mix_patches", MIX, 8, np.ones(3, np.float32)),
        ("mix_patches", MIX, 9, [3, 1, 4, 4, 1, 3, 2]),
        ("mix_patches", MIX, 9, [3, 1, 4, 8, 1, 2, 2]),
        ("mix_patches", MIX, 9, [-3, -1, 4, 4, 1, 2, 2]),
        ("mix_patches", MIX, 10, (0, 0, 0, 9, 1, 3)),
        ("mix_patches", MIX, 10, (0, 0, 0, 0, 4, 3)),
        ("select_patches", SELECT, 1, None),
        ("select_patches", SELECT, 1, np.empty((4, 1), int)),
        ("select_patches", SELECT, 3, np.empty((4, 4), bool)),
        ("select_patches", SELECT, 4, np.empty((2, 4, 5), np.float32)),
        ("select_patches", SELECT, 5, C[:, ::6000]),
        ("select_patches", SELECT, 6, 6),
        ("select_patches", SELECT, 6, -1),
        ("modulate", MODULATE, 0, read_only(TOKENS)),
        ("modulate", MODULATE, 1, TOKENS[:3].copy()),
        ("modulate", MODULATE, 3, TOKENS),  # and the table has no gate
        ("modulate", MODULATE, 4, np.ones((2, 2, 4), np.float32)),
        ("modulate", MODULATE, 5, ROWS + 2),
        ("modulate", MODULATE, 5, ROWS - 1),
        ("modulate", MODULATE, 5, ROWS[:3]),
        ("modulate", MODULATE, 6, 3),
        ("gather_tokens", GATHER, 0, np.empty((2, 4, 16), np.float32)),
        ("gather_tokens", GATHER, 1, GATHER[1][:1]),
        ("gather_tokens", GATHER, 1, GATHER[1].astype(np.float16)),
        ("gather_tokens", GATHER, 2, IDS + 3),
        ("gather_tokens", GATHER, 2, IDS.astype(np.int64)),
        ("scatter_tokens", SCATTER, 1, GATHER[1][:, :2].copy()),
        ("scatter_tokens", SCATTER, 2, GATHER[0][:, :2].copy()),
        ("scatter_tokens", SCATTER, 3, IDS - 1),
        ("scatter_tokens", SCATTER, 4, np.ones((2, 2), np.float32)),
    ],
)
def test_bindings_look_before_they_read(function, usual, place, wrong):
    getattr(_host, function)(*usual)
    with pytest.raises(ValueError):
        getattr(_host, function)(*usual[:place], wrong, *usual[place + 1 :])


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


def test_threadpoolctl_sets_them():
    threadpoolctl = pytest.importorskip("threadpoolctl", "3.5")
    import pydiffuse.integrations.threadpoolctl  # noqa: F401

    before = pn.num_threads()
    try:
        pn.set_num_threads(3)
        with threadpoolctl.threadpool_limits(1):
            assert pn.num_threads() == 1
        with threadpoolctl.threadpool_limits(2, user_api="pydiffuse"):
            assert pn.num_threads() == 2
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            assert pn.num_threads() == 3
        assert pn.num_threads() == 3
    finally:
        pn.set_num_threads(before)


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
