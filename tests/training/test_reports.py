"""What a run reports besides its losses: MFU, the time that is left, files for TensorBoard."""

import dataclasses
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from fsa_jax.training import PRESETS, train
from fsa_jax.training import progress as shown
from fsa_jax.training.flops import flops_per_token, peak_flops
from fsa_jax.training.folder import check_startable, clear
from fsa_jax.training.step import abstract_model
from fsa_jax.training.tensorboard import TensorBoard
from training.runs import DENSE, MODEL, tiny


@dataclasses.dataclass
class Device:
    device_kind: str


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float16", 989e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA L40", "bfloat16", 181e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA H200", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peaks(kind, dtype, peak):
    device: Any = Device(kind)
    assert peak_flops(device, dtype) == peak


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_token(tied):
    """Counted by hand for a dense layer; the table of an untied embedding is only looked up."""
    model = dataclasses.replace(DENSE, num_layers=1, tie_embeddings=tied)
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16
    expected = 6 * (attention + 3 * 16 * 16 + 257 * 16)
    assert flops_per_token(abstract_model(model)[1], model) == expected


def test_lines_show_mfu_and_the_time_that_is_left(monkeypatch, capfd):
    now = [100.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    with shown.Progress(100, 400, show=True) as progress:
        now[0] += 60
        progress.steps([{"step": 200, "loss": 1.0, "tokens_per_s": 5.0, "mfu": 0.412}])
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == "step 200/400: loss 1.000, tokens/s 5, MFU 41.2%, ETA 0:02:00"


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """Returns step, name and value of each number in the files for TensorBoard."""
    from tensorboardX.proto import event_pb2

    event_type: Any = vars(event_pb2)["Event"]
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_type.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, x.tag, x.simple_value) for x in event.summary.value]
            at += length + 16
    return found


def test_files_for_tensorboard(tmp_path):
    validation = {"step": 2, "val_loss": 2, "held_out_loss": 2}
    rows = [{"step": 1, "loss": 2.5, "grad_norm": 1.0}, validation]
    with TensorBoard(tmp_path, last_step=0, write=True) as board:
        board.write(rows)
    expected = [(1, "loss", 2.5), (1, "grad_norm", 1.0), (2, "val_loss", 2.0)]
    assert scalars(tmp_path / "tensorboard") == expected
    with TensorBoard(tmp_path / "none", last_step=0, write=False) as board:
        board.write(rows)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_run_writes_for_tensorboard(texts, tmp_path):
    config = tiny(texts, tmp_path, model=DENSE, tensorboard=True, steps=2)
    result = train(config)
    assert tmp_path / "tensorboard" in result.files
    found = scalars(tmp_path / "tensorboard")
    assert {(step, name) for step, name, _ in found} >= {(1, "loss"), (2, "loss"), (2, "val_loss")}
    check_startable(tmp_path, resume=False, overwrite=True)
    (tmp_path / "tensorboard" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"tensorboard/mine.txt is not a file for TensorBoard"):
        check_startable(tmp_path, resume=False, overwrite=True)
    (tmp_path / "tensorboard" / "mine.txt").unlink()
    clear(tmp_path)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "checkpoints"])


def test_files_of_others_are_not_written_between(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"out must not|overwrite must replace only"):
            check_startable(tmp_path, resume=False, overwrite=overwrite)


def test_tensorboard_without_its_package(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"tensorboard must be False .*'\.\[tensorboard\]'"):
        train(tiny(texts, tmp_path / "out", model=MODEL, tensorboard=True))
    assert not (tmp_path / "out").exists()


def test_presets_write_no_files_for_tensorboard():
    assert not any(preset.tensorboard for preset in PRESETS.values())
