"""Kernels of other projects in the benchmark, with stand-ins for torch and their packages."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fsa_jax
from fsa_jax.bench.cases import TINY, Case
from fsa_jax.bench.config import BenchConfig, Run
from fsa_jax.bench.measure import peers
from fsa_jax.bench.report.markdown import report
from fsa_jax.bench.run import bench
from fsa_jax.bench.suites import attention

CASE = Case(length=120, heads=6, kv_heads=2, width=16, config=TINY)


class Event:
    """A CUDA event, recorded one millisecond after the previous one."""

    count = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.count += 1
        self.time = Event.count

    def elapsed_time(self, end):
        return float(end.time - self.time)


def attend(lists, block_size, scale):
    return lambda query, key, value: fsa_jax.selected_attention(
        query,
        key,
        value,
        jnp.transpose(lists, (1, 0, 2)),
        block_size=block_size,
        scale=scale,
        implementation="reference",
        return_residuals=True,
    )


def forward(q, k, v, lists, block_size, starts, ends, most_q, most_k, scale):
    np.testing.assert_array_equal(starts, [0, q.shape[0]])
    assert lists.shape == (k.shape[1], q.shape[0], TINY.topk)
    assert most_q == most_k == q.shape[0]
    assert scale == q.shape[2] ** -0.5
    out, lse = attend(lists, block_size, scale)(q, k, v)
    return out, lse.T, "permuted"


def backward(out, dout, lse, q, k, v, lists, block_size, starts, ends, most_q, most_k, scale, kept):
    assert kept == "permuted"
    assert lse.shape == out.shape[1::-1]
    (_, lse), pullback = jax.vjp(attend(lists, block_size, scale), q, k, v)
    return pullback((dout, jnp.zeros_like(lse)))


@pytest.fixture
def packages(monkeypatch):
    """Makes torch and the package of one other project importable."""

    def install(forward, backward=backward):
        cuda = types.SimpleNamespace(Event=Event, synchronize=lambda: None)
        torch = types.SimpleNamespace(from_dlpack=lambda x: x, cuda=cuda)
        monkeypatch.setattr(peers, "_torch", lambda: torch)
        name, *functions = peers.PEERS["peer_fsa"]
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:end]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(sys.modules[name]).update(zip(functions, (forward, backward), strict=True))

    return install


def rows_of(methods):
    state = Run(BenchConfig(rounds=2, threads=2), interpret=True, peers=methods)
    rows = list(attention.measure_cases(state, [(CASE, ("selected_attention",))], "xla"))
    return {(row["method"], row["pass"]): row for row in rows if row["method"] in methods}


@pytest.mark.slow
def test_a_peer_is_timed_and_compared(packages):
    packages(forward)
    rows = rows_of(("peer_fsa",))
    assert set(rows) == {("peer_fsa", "forward"), ("peer_fsa", "backward")}
    for row in rows.values():
        assert row["samples_ms"] == [0.1, 0.1]  # ten calls take one millisecond
        assert row["agrees"] is True
        assert 0 < row["relative_error"] < 0.05
        assert row["flops"] > 0


@pytest.mark.slow
def test_a_peer_that_is_wrong_stays_and_says_so(packages, tmp_path):
    def wrong(*args):
        out, *rest = forward(*args)
        return 1.2 * out, *rest

    packages(wrong)
    rows = rows_of(("peer_fsa",))
    assert rows["peer_fsa", "forward"]["agrees"] is False
    assert rows["peer_fsa", "backward"]["agrees"] is True
    head = {
        "what": "fsa-jax bench", "suite": "kernels", "measurement": True, "complete": True,
        "date": "2026-01-02", "commit": "c", "device": "d", "driver": "", "versions": {},
        "ceilings": None, "rows": list(rows.values()),
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(head))
    report(tmp_path, tmp_path)
    assert (tmp_path / "benchmarks.md").read_text().count("differs from ours") == 1


@pytest.mark.slow
def test_what_fails_in_a_peer_is_recorded(packages):
    def broken(*args):
        raise RuntimeError("out of memory")

    packages(broken)
    rows = rows_of(("peer_fsa", "peer_nsa"))
    assert rows["peer_fsa", "forward"]["error"] == "RuntimeError: out of memory"
    assert rows["peer_nsa", "backward"]["error"].startswith("ModuleNotFoundError: No module named")


def test_which_peers_are_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert peers.wanted(None) == ()
    assert peers.wanted(tmp_path) == tuple(peers.PEERS)
    assert sys.path[0] == str(tmp_path.resolve())
    with pytest.raises(ValueError, match="peer_path must be a folder, got"):
        bench(BenchConfig(peer_path=tmp_path / "missing", out=tmp_path))
