"""Old names of settings, flags and metrics work with a warning; old runs load without one."""

import dataclasses
import json
import math
import shlex
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
from util import assert_same_bits

import fsa_jax.training
from fsa_jax.cli import main
from fsa_jax.training import (
    PRESETS,
    Corpus,
    RunStopped,
    TrainConfig,
    TrainingBatches,
    TrainResult,
    load_model,
    plot_losses,
    read_metrics,
    train,
)
from fsa_jax.training.metrics import curve
from training.runs import DENSE, saved_state, tiny, without_times

FIELDS = [
    ("row_length", "seq_len", 64),
    ("eval_rows", "eval_sequences", 7),
    ("data", "text", (Path("a"),)),
]


def settings() -> dict:
    fields = dataclasses.fields(TrainConfig)
    return {field.name: getattr(PRESETS["tiny"], field.name) for field in fields}


@pytest.mark.parametrize(("old", "new", "value"), FIELDS)
def test_a_field_has_its_old_name_too(old, new, value):
    given = settings()
    del given[new], given["seed"]
    with pytest.warns(DeprecationWarning, match=f"{old} is now called {new}") as caught:
        config = TrainConfig(**given, **{old: value})
    assert caught[0].filename == __file__
    assert config == dataclasses.replace(PRESETS["tiny"], **{new: value})
    with pytest.warns(DeprecationWarning, match=f"{old} is now called {new}") as caught:
        assert getattr(config, old) == value
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("old", "new", "value"), FIELDS)
def test_replace_takes_old_names(old, new, value):
    """`replace` also passes the new name with its previous value; the old name must win."""
    with pytest.warns(DeprecationWarning, match=f"{old} is now called {new}") as caught:
        config = dataclasses.replace(PRESETS["tiny"], **{old: value, "steps": 9})
    assert caught[0].filename == __file__
    assert config == dataclasses.replace(PRESETS["tiny"], **{new: value, "steps": 9})


def test_replace_takes_several_old_names():
    old = {name: value for name, _, value in FIELDS}
    new = {name: value for _, name, value in FIELDS}
    with pytest.warns(DeprecationWarning, match="is now called"):
        config = dataclasses.replace(PRESETS["tiny"], **old)
    assert config == dataclasses.replace(PRESETS["tiny"], **new)


@pytest.mark.parametrize(("old", "new", "value"), FIELDS)
def test_both_names_of_a_field_are_an_error(old, new, value):
    message = f"{new} and {old}, its old name, must not both be given, got {new}=.* and {old}="
    given = settings() | {new: value}
    for order in ({old: value, **given}, {**given, old: value}):
        del order["seed"]
        with pytest.raises(ValueError, match=message):
            TrainConfig(**order)
    for changes in ({old: value, new: value}, {new: value, old: value}):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(PRESETS["tiny"], **changes)


def test_arguments_of_the_batches_have_their_old_names_too():
    documents, common = [b"one document", b"another one"], {"batch_size": 2, "seed": 0}
    old: Any = {"row_length": 8, "rows": (0, 1)}
    with pytest.warns(DeprecationWarning, match="now called"):
        got = next(TrainingBatches(documents, **common, **old))
    wanted = next(TrainingBatches(documents, **common, seq_len=8, sequences=(0, 1)))
    assert got.tokens.tolist() == wanted.tokens.tolist()


@pytest.mark.parametrize(
    ("make", "rest", "old", "new"),
    [
        (Corpus, {"train": (), "source": "", "fingerprint": ""}, "held_out", "validation"),
        (TrainResult, {"step": 1, "unigram_loss": 3.0, "files": ()}, "held_out_loss", "val_loss"),
    ],
)
def test_results_have_their_old_names_too(make, rest, old, new):
    message = f"{old} is now called {new}"
    with pytest.warns(DeprecationWarning, match=message):
        made = make(**rest, **{old: 0.5})
    assert made == make(**rest, **{new: 0.5})
    with pytest.warns(DeprecationWarning, match=message):
        assert getattr(made, old) == 0.5


def test_bits_per_byte():
    result = TrainResult(step=1, val_loss=math.log(2), unigram_loss=3.0, files=())
    assert result.val_bits_per_byte == pytest.approx(1.0)


def test_old_flags_are_named_on_standard_error(configs, capfd):
    words = "train --data a b --row-length=64 --eval_rows 7 --steps 60"
    with pytest.warns(DeprecationWarning, match="now called"):
        assert main(shlex.split(words)) == 0
    wanted = {"text": (Path("a"), Path("b")), "seq_len": 64, "eval_sequences": 7, "steps": 60}
    assert configs == [dataclasses.replace(PRESETS["tiny"], **wanted)]
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "fsa-jax: --data is now called --text",
        "fsa-jax: --row-length is now called --seq-len",
        "fsa-jax: --eval-rows is now called --eval-sequences",
    ]


@pytest.mark.parametrize("words", ["--data a --text b", "--seq-len 8 --row_length=8"])
def test_both_spellings_of_a_flag_are_an_error(words, capfd):
    assert main(["train", *words.split()]) == 2
    old, new = ("data", "text") if "data" in words else ("row-length", "seq-len")
    message = f"fsa-jax: error: --{new} and --{old}, its old name, must not both be given\n"
    assert capfd.readouterr() == ("", message)


def test_the_command_that_continues_a_run_has_the_new_names(monkeypatch, capfd):
    def stop(config):
        raise RunStopped(signal.SIGTERM, saved=3, trained=True)

    monkeypatch.setattr(fsa_jax.training, "train", stop)
    with pytest.warns(DeprecationWarning, match="now called"):
        assert main(["train", "--data", "a", "--row-length=64"]) == 143
    assert "Go on with: fsa-jax train --text a --seq-len=64 --resume\n" in capfd.readouterr().err


OLD_CONFIG = {"text": "data", "seq_len": "row_length", "eval_sequences": "eval_rows"}
OLD_METRICS = {"val_loss": "held_out_loss", "val_bytes": "held_out_bytes"}
ADDED = {"held_out_loss", "held_out_bytes", "held_out_documents", "val_bits_per_byte"}


def with_old_names(values: dict, old_names: dict) -> dict:
    kept = {name: value for name, value in values.items() if name not in ADDED}
    return {old_names.get(name, name): value for name, value in kept.items()}


def rewrite_as_before(run: Path) -> None:
    """Rewrites the files of a run with the names from before the renaming."""
    for file in (run / "checkpoints").glob("*/position/*"):
        if file.read_bytes().startswith(b"{"):
            position = json.loads(file.read_text())
            position["config"] = with_old_names(position["config"], OLD_CONFIG)
            assert {"data", "row_length", "eval_rows"} <= position["config"].keys()
            file.write_text(json.dumps(position))
    metrics = run / "metrics.jsonl"
    rows = [
        with_old_names(json.loads(line), OLD_METRICS) for line in metrics.read_text().splitlines()
    ]
    assert any("held_out_loss" in row for row in rows)
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    description = json.loads((run / "run.json").read_text())
    description["config"] = with_old_names(description["config"], OLD_CONFIG)
    description["result"] = with_old_names(description["result"], OLD_METRICS)
    old_data = {"val_documents": "held_out_documents", "val_bytes": "held_out_bytes"}
    description["data"] = with_old_names(description["data"], old_data)
    (run / "run.json").write_text(json.dumps(description))


def test_a_run_of_before_is_loaded_and_resumed_bitwise(texts, dense, tmp_path):
    run = shutil.copytree(dense, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "6")
    rewrite_as_before(run)
    assert load_model(run)[1].seq_len == 32
    train(tiny(texts, run, model=DENSE, resume=True))
    config = tiny(texts, dense, model=DENSE)
    assert_same_bits(saved_state(config, 6)[0], saved_state(tiny(texts, run, model=DENSE), 6)[0])
    got, wanted = (without_times(read_metrics(x / "metrics.jsonl")) for x in (run, dense))
    assert got == wanted
    # All rows have the new name, with the old name beside it.
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["val_loss"] for row in rows if "held_out_loss" in row] == curve(got, "val_loss")[1]
    result = json.loads((run / "run.json").read_text())["result"]
    assert result["val_loss"] == result["held_out_loss"] == got[-1]["val_loss"]
    assert result["val_bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2))


def test_a_run_of_before_is_replaced_where_asked(texts, dense, tmp_path):
    run = shutil.copytree(dense, tmp_path / "run")
    rewrite_as_before(run)
    with pytest.raises(ValueError, match="out must not hold a run already"):
        train(tiny(texts, run, model=DENSE))
    fsa_jax.training.folder.check_startable(run, resume=False, overwrite=True)


def test_rows_of_either_name_are_plotted(tmp_path):
    rows = [{"step": 1, "held_out_loss": 2.0}, {"step": 2, "val_loss": 1.0}]
    assert curve(rows, "val_loss") == ([1, 2], [2.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_losses(tmp_path / "loss.png", {"run": rows}, unigram_loss=3.0)
