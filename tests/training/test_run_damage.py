"""Failures that a run can meet: damaged checkpoints and metrics, full disks, closed terminals."""

import errno
import shutil
from pathlib import Path

import pytest
from util import assert_same_bits

from fsa_jax.messages import naming
from fsa_jax.training import Checkpoints, load_model, read_metrics, train
from fsa_jax.training import folder as files
from fsa_jax.training import progress as shown
from fsa_jax.training.metrics import MetricsLog
from training.runs import DENSE, saved_state, tiny, without_times

ROW = '{"step": 1, "loss": 2.0}\n'


# Damage


def damage(path: Path) -> None:
    """Truncates every file to half its length."""
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_metadata(checkpoint: Path) -> None:
    (checkpoint / "_CHECKPOINT_METADATA").unlink()
    damage(checkpoint)


def emptied(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGES = {
    "params": lambda x: damage(x / "params"),
    "rest": lambda x: damage(x / "rest"),
    "position": lambda x: damage(x / "position"),
    "no rest": lambda x: shutil.rmtree(x / "rest"),
    "no metadata": no_metadata,
    "emptied": emptied,
}


@pytest.mark.fast_cases("rest", "position", "no rest", "no metadata", "emptied")
@pytest.mark.parametrize("kind", DAMAGES)
def test_the_last_whole_checkpoint_is_taken(kind, texts, run, capfd):
    DAMAGES[kind](run / "checkpoints" / "6")
    wanted = saved_state(tiny(texts, run, model=DENSE), 3)[0]
    with Checkpoints(run) as checkpoints:

        def read(step):
            return checkpoints.read_position(step), checkpoints.read_state(step, wanted)

        step, (_, found) = checkpoints.newest(read)
        assert step == 3
        assert_same_bits(found, wanted)
        assert f"got '{run}/checkpoints/6'" in capfd.readouterr().err
        checkpoints.set_aside_after(3)
        assert checkpoints._steps() == [3]
    if "rest" not in kind:
        DAMAGES[kind](run / "checkpoints" / "3")
        with pytest.raises(ValueError, match=r"checkpoint must be .*complete, got .*/run/"):
            load_model(run)


@pytest.mark.slow
def test_a_run_goes_on_from_the_last_whole_checkpoint(texts, run, dense, capfd):
    damage(run / "checkpoints" / "6" / "rest")
    config = tiny(texts, run, resume=True, model=DENSE)
    train(config)
    assert capfd.readouterr().err.count("the checkpoint of step 3 is taken instead") == 1
    assert_same_bits(saved_state(config, 6)[0], saved_state(tiny(texts, dense, model=DENSE), 6)[0])
    wanted, got = (without_times(read_metrics(x / "metrics.jsonl")) for x in (dense, run))
    assert got == wanted
    # The damaged checkpoint is kept separately, and the run can be replaced.
    assert (run / "damaged-checkpoint-6-1" / "rest").is_dir()
    files.check_startable(run, resume=False, overwrite=True)


LINES = {
    "NULs": "\0" * 50,
    "cut": '{"step": 2, "lo',
    "no row": "5",
    "no step": '{"loss": 1.0}',
    "a step that is no number": '{"step": "2", "loss": 1.0}',
    "a loss that is no number": '{"step": 2, "loss": null}',
    "a loss that is not finite": '{"step": 2, "val_loss": NaN}',
}


@pytest.mark.parametrize("kind", LINES)
def test_a_damaged_row_is_named_and_left_out(kind, tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    last = '{"step": 3, "loss": 1.5}\n'
    path.write_text(ROW + LINES[kind] + "\n\n" + last)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{path}, line 2: must be a row of metrics, got "):
        read_metrics(path)
    with MetricsLog(path, last_step=9) as log:
        assert [row["step"] for row in log.kept] == [1, 3]
    assert path.read_text() == ROW + last
    assert f"{path}, line 2: left out" in capfd.readouterr().err
    assert (tmp_path / "damaged-metrics-1").read_bytes() == before


def test_bytes_that_are_no_text_are_a_damaged_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ROW.encode() + b"\xff\xfe\n")
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("end", "steps"), [("", [1]), ("\n\n", [1]), (ROW[:9], [1]), (ROW[:-1], [1, 1])]
)
def test_a_last_line_that_was_cut_off_is_no_damage(end, steps, tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    path.write_text(ROW + end)
    assert [row["step"] for row in read_metrics(path)] == steps
    with MetricsLog(path, last_step=9):
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "line",
    ['{"step": 2, "grad_norm": NaN}', f'{{"step": 2, "loss": {"9" * 400}}}', "[" * 100000],
    ids=["not a number", "no float", "nested"],
)
def test_rows_that_cannot_be_written_again_are_damaged(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
    with MetricsLog(path, last_step=9) as log:
        assert [row["step"] for row in log.kept] == [1]


# Full disks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
def test_errors_of_writing_name_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*mine'"),
        naming(tmp_path / "mine"),
    ):
        Path("/dev/full").write_text("text")


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_a_file(texts, run, monkeypatch):
    config = tiny(texts, run, model=DENSE)
    state, position = saved_state(config, 6)

    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: no space\nand much more")

    with Checkpoints(run) as checkpoints:
        monkeypatch.setattr(checkpoints, "_save", full)
        with pytest.raises(OSError, match=r"RESOURCE_EXHAUSTED: no space: '.*run/checkpoints/9'$"):
            checkpoints.save(9, state, position)
        monkeypatch.undo()
        with pytest.raises(OSError, match=r"orbax has refused to save: '.*run/checkpoints/5'"):
            checkpoints.save(5, state, position)  # this step is older than the newest checkpoint


# Progress


def test_lines_come_by_steps_and_by_time_and_are_no_flood(monkeypatch, capfd):
    now = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])

    def lines(seconds_per_step: float, steps: int) -> list[str]:
        with shown.Progress(0, steps, show=True) as progress:
            for step in range(1, steps + 1):
                now[0] += seconds_per_step
                progress.steps([{"step": step, "loss": 1.0, "tokens_per_s": 1.0}])
        return [line.split(":")[0] for line in capfd.readouterr().err.splitlines()]

    assert lines(0.1, 150) == [f"step {step}/150" for step in (50, 100, 150)]
    assert lines(20.0, 5) == ["step 2/5", "step 4/5"]
    assert lines(0.001, 3000) == ["step 1000/3000", "step 2000/3000", "step 3000/3000"]


def test_a_terminal_that_was_closed_does_not_end_a_run(monkeypatch):
    class Closed:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        flush = write

        def isatty(self):
            return False

    monkeypatch.setattr(shown.sys, "stderr", Closed())
    with shown.Progress(0, 50, show=True) as progress:
        progress.evaluation({"step": 50, "val_loss": 1.0})
