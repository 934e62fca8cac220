"""Training runs in processes of their own, over loopback."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

STEPS = 5
COMMON = {
    "steps": STEPS, "eval-every": STEPS, "eval-sequences": 2, "checkpoint-every": 1,
    "batch-size": 4, "seq-len": 64, "warmup-steps": 2, "decay-steps": STEPS, "learning-rate": 0.01,
    "num-layers": 1, "embed-dim": 16, "num-heads": 2, "num-kv-heads": 2, "head-dim": 8,
    "mlp-dim": 16, "kernel-size": 4, "kernel-stride": 2, "block-size": 4, "topk": 3,
    "init-blocks": 1, "local-blocks": 1, "window-size": 6,
}  # fmt: skip


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


def saved_steps(out: Path) -> list[int]:
    # orbax first writes under another name.
    return [int(x.name) for x in (out / "checkpoints").glob("*") if x.name.isdigit()]
