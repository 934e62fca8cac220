"""Runs of two processes with four CPU devices each, over loopback, against one process."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from fsa_jax.training import read_metrics
from training.processes import STEPS, finish, saved_steps, start

# Only one run at a time, because runs share the machine's cores.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]


def losses(out: Path) -> np.ndarray:
    rows = read_metrics(out / "metrics.jsonl")
    return np.asarray([row[name] for row in rows for name in ("loss", "val_loss") if name in row])


@pytest.fixture(scope="module")
def alone(texts, tmp_path_factory) -> np.ndarray:
    """Returns the losses of one process with one device."""
    out = tmp_path_factory.mktemp("alone")
    ((code, text),) = finish(start(texts, out, "--overwrite"))
    assert code == 0, text
    return losses(out)


@pytest.mark.parametrize("mesh", ["data=4,tensor=2", "data=2,sequence=4"])
def test_two_processes_train_as_one(mesh, texts, alone, tmp_path):
    ends = finish(start(texts, tmp_path, "--mesh", mesh, "--fsdp", "--overwrite", processes=2))
    assert [code for code, _ in ends] == [0, 0], "\n".join(text for _, text in ends)
    assert alone.shape == (STEPS + 1,)
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=2e-6)


def test_a_process_that_dies_ends_the_run_and_it_can_go_on(texts, tmp_path):
    """Uses full attention, which compiles fast."""
    dense = {"attention": "full", "checkpoint_every": 20}
    flags = ("--mesh", "data=4,tensor=2")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    (one,) = finish(start(texts, straight, **dense, steps=100, decay_steps=200, eval_every=100))
    assert one[0] == 0, one[1]

    started = start(
        texts,
        killed,
        *flags,
        processes=2,
        **dense,
        steps=100_000,
        decay_steps=200,
        eval_every=10**6,
    )
    try:
        ends = time.monotonic() + 200
        while not saved_steps(killed):
            assert time.monotonic() < ends
            assert all(one.poll() is None for one in started), started[0].communicate()
            time.sleep(0.05)
        started[1].send_signal(signal.SIGKILL)
        since = time.monotonic()
    finally:
        (code, text), _ = finish(started, timeout=120)
    assert time.monotonic() - since < 90
    assert code != 0
    # jax itself may notice first, and then ends the process.
    assert "another process of the run ended" in text or "another task died" in text, text
    assert max(saved_steps(killed)) < 100, "killed too late for this test"

    rest = {**dense, "steps": 100, "decay_steps": 200, "eval_every": 100}
    ends = finish(start(texts, killed, *flags, "--resume", processes=2, **rest))
    assert [code for code, _ in ends] == [0, 0], "\n".join(text for _, text in ends)
    np.testing.assert_allclose(losses(killed), losses(straight), rtol=2e-6)
