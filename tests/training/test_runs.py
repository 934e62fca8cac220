"""Protection against data loss: run folders, runs stopped by signals, damaged files, full disks."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from util import assert_same_bits

from fsa_jax.training import (
    RunStopped,
    loop,
    read_metrics,
    stopping,
    train,
)
from fsa_jax.training import folder as files
from fsa_jax.training.optimizer import learning_rate_schedule
from fsa_jax.training.stopping import catching_signals
from training.processes import finish, saved_steps, start
from training.runs import DENSE, saved_state, signals_at, tiny, without_times

ROW = '{"step": 1, "loss": 2.0}\n'
OURS = json.dumps({"what": "fsa-jax train"})
#: The description that runs wrote before it had the key "what".
OLDER = json.dumps(
    dict.fromkeys(("config", "versions", "devices", "parameters", "data", "unigram_loss"))
)
CHECKPOINT = {"checkpoints/3/_CHECKPOINT_METADATA": "{}"}


def fill(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# Folders


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"notes.txt": "mine"},
        {"metrics.jsonl": ""},
        {"run.json": OURS, "metrics.jsonl": ""},
        {"run.json": OLDER},
        {"run.json": OURS, "tokenizer.json": "{}", "tokenizer_config.json": "{}"},
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_may_begin_where_nothing_is_lost(texts, overwrite, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    files.check_startable(fill(tmp_path, texts), resume=False, overwrite=overwrite)


@pytest.mark.parametrize(
    ("texts", "ours"),
    [
        ({"metrics.jsonl": ROW}, False),
        ({"metrics.jsonl": ROW, "run.json": "{"}, False),
        ({"run.json": "{}"}, False),
        ({"run.json": '{"what": "fsa-jax bench"}', "metrics.jsonl": ROW}, False),
        ({"loss.png": "a picture"}, False),
        ({"tokenizer.json": "mine"}, False),
        ({"blocks.png": "a picture", "notes.txt": "mine"}, False),
        ({"checkpoints/weights.bin": "mine"}, False),
        ({"checkpoints": "a file"}, False),
        ({"metrics.jsonl/in a folder": "mine", "run.json": OURS}, False),
        ({"checkpoints/3/mine": "no checkpoint", "run.json": OURS}, False),
        ({**CHECKPOINT, "checkpoints/notes.txt": "mine", "run.json": OURS}, False),
        (CHECKPOINT, False),
        ({"run.json": OURS, "metrics.jsonl": ROW}, True),
        ({"run.json": OLDER, "metrics.jsonl": ROW, "notes.txt": "mine"}, True),
        ({"run.json": OURS, "loss.png": "a picture", **CHECKPOINT}, True),
        ({"run.json": OURS, "metrics.jsonl": ROW, "tokenizer.json": "{}"}, True),
    ],
)
def test_what_is_replaced_only_where_asked_and_what_never(texts, ours, tmp_path):
    fill(tmp_path, texts)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"out must not hold a run already, got '.*', where "):
        files.check_startable(tmp_path, resume=False, overwrite=False)
    if ours:
        files.check_startable(tmp_path, resume=False, overwrite=True)
        files.clear(tmp_path)
        assert set(contents(tmp_path)) == set(before) & {"notes.txt"}
    else:
        with pytest.raises(ValueError, match=r"overwrite must replace .* got '.*', where"):
            files.check_startable(tmp_path, resume=False, overwrite=True)
        assert contents(tmp_path) == before


def test_a_linked_folder_is_no_checkpoint(tmp_path):
    fill(tmp_path / "run", {"run.json": OURS, "checkpoints/notes": ""})
    (tmp_path / "run" / "checkpoints" / "notes").unlink()
    other = fill(tmp_path / "other", {"_CHECKPOINT_METADATA": "{}"})
    (tmp_path / "run" / "checkpoints" / "7").symlink_to(other)
    with pytest.raises(ValueError, match="checkpoints/7 is not a checkpoint"):
        files.check_startable(tmp_path / "run", resume=False, overwrite=True)


def test_a_folder_is_held_by_one_run(texts, tmp_path):
    (tmp_path / ".fsa-jax.lock").write_text("process 7 on a host, of a run that was killed")
    with files.locked(tmp_path):
        with pytest.raises(ValueError, match=rf"out must not be in use .* process {os.getpid()} "):
            train(tiny(texts, tmp_path, model=DENSE))
        with pytest.raises(ValueError, match="out must not be in use"), files.locked(tmp_path):
            pass
    assert contents(tmp_path) == {}
    with files.locked(tmp_path):
        assert list(contents(tmp_path)) == [".fsa-jax.lock"]


def test_a_lock_that_another_run_deletes_is_taken_anew(tmp_path, monkeypatch):
    """The other run ends between this run's opening of the file and locking it."""
    lock, calls = files._lock, []

    def late(descriptor, folder):
        if not calls:
            (tmp_path / ".fsa-jax.lock").unlink()
            (tmp_path / ".fsa-jax.lock").touch()  # a third run creates it
        calls.append(descriptor)
        lock(descriptor, folder)

    monkeypatch.setattr(files, "_lock", late)
    with files.locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ValueError, match="in use"), files.locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.locked(tmp_path):
        message = "cannot be locked (No locks available): do not start a second run"
        assert message in capfd.readouterr().err


def test_out_is_a_path():
    with pytest.raises(ValueError, match=r"out must be a pathlib\.Path or None, got ''"):
        tiny(Path("texts"), "")  # pyright: ignore[reportArgumentType]


def test_files_of_others_are_left_as_they_are(tmp_path):
    """Covers a file or link with the lock's name, and checkpoints that are stored elsewhere."""
    lock, own = tmp_path / ".fsa-jax.lock", tmp_path / "own"
    own.write_text("own data")
    for make in (lambda: lock.write_text("own data"), lambda: lock.symlink_to(own)):
        make()
        with pytest.raises(ValueError, match=r"out must not hold"), files.locked(tmp_path):
            pass
        assert lock.read_text() == own.read_text() == "own data"
        lock.unlink()
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    (elsewhere / "5").mkdir(parents=True)
    run.mkdir()
    files.write_description(run, {})
    (run / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="checkpoints is a symbolic link"):
        files.check_startable(run, resume=False, overwrite=True)
    (run / "checkpoints").unlink()
    (run / "checkpoints" / "x.orbax-checkpoint-tmp-notes").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        files.check_startable(run, resume=False, overwrite=True)


# Signals


@pytest.mark.slow
def test_a_stopped_run_goes_on_bitwise_and_can_be_made_longer(
    texts, dense, tmp_path, monkeypatch, capfd
):
    config = tiny(texts, tmp_path / "run", model=DENSE, decay_steps=None)
    with monkeypatch.context() as patch:
        signals_at(patch, 4, signal.SIGTERM)
        with pytest.raises(RunStopped) as stopped:
            train(config)
    assert (stopped.value.signal, stopped.value.saved) == (signal.SIGTERM, 4)
    assert "SIGTERM: saving a checkpoint after this step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(dataclasses.replace(config, resume=True))
    state, position = saved_state(config, 6)
    assert_same_bits(saved_state(tiny(texts, dense, model=DENSE), 6)[0], state)
    wanted = without_times(read_metrics(dense / "metrics.jsonl"))
    assert without_times(read_metrics(config.run_folder / "metrics.jsonl")) == wanted

    # The learning rate continues as in a run of 7 steps that decays over 6.
    assert position.config.decay_steps == 6
    capfd.readouterr()
    train(dataclasses.replace(config, resume=True, steps=7))
    assert "the learning rate falls until step 6" in capfd.readouterr().err
    rates = {
        row["step"]: row["learning_rate"]
        for row in read_metrics(config.run_folder / "metrics.jsonl")
        if "learning_rate" in row
    }
    schedule = learning_rate_schedule(dataclasses.replace(config, steps=7, decay_steps=6))
    wanted = [float(np.asarray(schedule(step))) for step in range(7)]
    np.testing.assert_allclose([rates[step] for step in range(1, 8)], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "last"),
    [({}, 600), ({"steps": 5000}, 5000), ({"steps": 5000, "decay_steps": 9}, 9)],
)
def test_decay_follows_the_steps(changes, last):
    changes = {"steps": 600, "decay_steps": None} | changes
    assert tiny(Path("texts"), Path("out"), **changes).last_decay_step == last


def test_a_run_shorter_than_its_warmup_warms_up_as_a_longer_one():
    short, long = (
        tiny(Path("texts"), Path("out"), warmup_steps=50, decay_steps=decay, steps=steps)
        for steps, decay in ((5, None), (600, 600))
    )
    short, long = (learning_rate_schedule(x) for x in (short, long))
    assert [float(np.asarray(short(i))) for i in range(5)] == [
        float(np.asarray(long(i))) for i in range(5)
    ]


@pytest.fixture
def heeded():
    """Python's own handlers: a shell makes commands in the background ignore some signals."""
    own = {signal.SIGINT: signal.default_int_handler}
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, own.get(number, signal.SIG_DFL)) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeded")
def test_a_signal_before_the_first_step_ends_a_run_at_once(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(loop._Run, "_compile", lambda run: os.kill(os.getpid(), signal.SIGINT))
    config = tiny(texts, tmp_path / "run", model=DENSE)
    with pytest.raises(RunStopped) as stopped:
        train(config)
    assert (stopped.value.saved, stopped.value.trained) == (None, False)
    assert contents(config.run_folder) == {}
    files.check_startable(config.run_folder, resume=False, overwrite=False)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_waits_for_a_step_and_the_second_does_not(number):
    before = signal.getsignal(number)
    with catching_signals() as stop:
        stop.stepping = stop.trained = True
        assert not stop.due(1)
        os.kill(os.getpid(), number)
        assert stop.due(2)
        with pytest.raises(RunStopped) as stopped:
            os.kill(os.getpid(), number)
    assert (stopped.value.signal, stopped.value.trained) == (number, True)
    assert signal.getsignal(number) == before


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catching_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("stepping", "count"), [(False, 1), (True, 2)])
def test_code_that_python_cannot_interrupt_is_not_waited_for(stepping, count, monkeypatch):
    """One signal ends the process before the first step; during a step it takes two."""
    monkeypatch.setattr(stopping, "_PATIENCE_SECONDS", 0.02)
    seen: list[tuple[signal.Signals, bool]] = []

    def send():
        for _ in range(count):
            assert not seen
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)

    def at_once(stop: RunStopped):
        seen.append((stop.signal, over.is_set()))

    over, sender = threading.Event(), threading.Timer(0.02, send)
    with contextlib.suppress(RunStopped), catching_signals(at_once) as stop:
        stop.stepping = stepping
        sender.start()
        # A single call, during which Python runs no signal handlers.
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000)
        over.set()
    sender.join()
    assert seen == [(signal.SIGTERM, False)]


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_all_processes_stop_at_the_same_step(texts, tmp_path):
    """Only one process gets the signal, here Ctrl-C, which jax's service does not catch."""
    sizes = {"attention": "full", "steps": 10**6, "eval_every": 10**6, "checkpoint_every": 20}
    started = start(texts, tmp_path, "--mesh", "data=4,tensor=2", processes=2, **sizes)
    try:
        ends = time.monotonic() + 200
        while not saved_steps(tmp_path):
            assert time.monotonic() < ends
            assert all(one.poll() is None for one in started), started[0].communicate()
            time.sleep(0.05)
        started[1].send_signal(signal.SIGINT)
    finally:
        (first, text), (second, other) = finish(started, timeout=120)
    assert (first, second) == (143, 130), text + other
    last = max(saved_steps(tmp_path))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    for one in (text, other):
        assert f"the checkpoint of step {last} is saved. Go on with: fsa-jax train" in one
