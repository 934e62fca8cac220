"""Runs of two processes with four CPU devices each, over loopback, against one process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fsa_jax.training import read_metrics

# Only one run at a time, because runs share the machine's cores.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]
STEPS = 5
COMMON = {
    "steps": STEPS, "eval-every": STEPS, "eval-sequences": 2, "checkpoint-every": 1,
    "batch-size": 4, "seq-len": 64, "warmup-steps": 2, "decay-steps": STEPS, "learning-rate": 0.01,
    "num-layers": 1, "embed-dim": 16, "num-heads": 2, "num-kv-heads": 2, "head-dim": 8,
    "mlp-dim": 16, "kernel-size": 4, "kernel-stride": 2, "block-size": 4, "topk": 3,
    "init-blocks": 1, "local-blocks": 1, "window-size": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"{i} bottles of beer on the wall. " * (1 + i % 4))
    return folder


def start(texts: Path, out: Path, *flags: str, processes: int = 1, **changes):
    """Starts `fsa-jax train`, and returns its processes."""
    settings = {**COMMON, **{name.replace("_", "-"): value for name, value in changes.items()}}
    command = [sys.executable, "-m", "fsa_jax.cli", "train", "--text", str(texts)]
    command += ["--out", str(out), *flags]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for number in range(processes):
        devices = f" --xla_force_host_platform_device_count={4 if processes > 1 else 1}"
        # These follow the flags of the tests; the last device count applies.
        env = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + devices}
        if processes > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        words = [*command, "--distributed"] if processes > 1 else command
        started.append(subprocess.Popen(words, env=env, **pipe))
    return started


def finish(started, timeout: float = 300) -> list[tuple[int, str]]:
    """Returns exit codes and output of the processes, none of which is left running."""
    try:
        ends = time.monotonic() + timeout
        texts = [one.communicate(timeout=ends - time.monotonic())[0] for one in started]
        return [(one.returncode, text) for one, text in zip(started, texts, strict=True)]
    finally:
        for one in started:
            if one.poll() is None:
                one.kill()
                one.communicate()


def losses(out: Path) -> np.ndarray:
    rows = read_metrics(out / "metrics.jsonl")
    return np.asarray([row[name] for row in rows for name in ("loss", "val_loss") if name in row])


def saved_steps(out: Path) -> list[int]:
    # orbax first writes under another name.
    return [int(x.name) for x in (out / "checkpoints").glob("*") if x.name.isdigit()]


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
