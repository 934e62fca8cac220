"""The trainer: steps, bitwise resuming, output files, plots, and errors."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from util import assert_same_bits

from fsa_jax import NSAConfig
from fsa_jax.training import (
    PRESETS,
    load_model,
    next_byte_loss,
    plot_blocks,
    plot_losses,
    read_metrics,
    train,
)
from fsa_jax.training.config import config_from_json, config_to_json
from fsa_jax.training.metrics import MetricsLog, curve
from fsa_jax.training.optimizer import decay_mask, learning_rate_schedule
from fsa_jax.training.plots import selection_image
from fsa_jax.training.step import (
    abstract_model,
    init_model,
    init_state,
    make_train_step,
)
from training.runs import DENSE, MODEL, NSA, saved_state, tiny, without_times


@pytest.mark.slow
def test_resume_goes_on_bitwise(texts, straight, tmp_path):
    config = tiny(texts, tmp_path / "stopped")
    train(dataclasses.replace(config, steps=3))
    # Simulates a kill after the checkpoint: rows of later steps, the last of them truncated.
    metrics = config.run_folder / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 4, "loss": 1.0, "tokens_per_s": 1.0}\n{"step": 5, "lo')
    result = train(dataclasses.replace(config, resume=True))

    expected_state, expected_position = saved_state(tiny(texts, straight), 6)
    state, position = saved_state(config, 6)
    assert_same_bits(expected_state, state)
    assert int(state.step) == 6
    assert position.batches == expected_position.batches

    expected = without_times(read_metrics(straight / "metrics.jsonl"))
    got = without_times(read_metrics(metrics))
    # The stopped run also evaluated at its end; nothing else differs.
    assert [row for row in got if row["step"] != 3 or "loss" in row] == expected
    assert result.val_loss == expected[-1]["val_loss"]


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(texts, run):
    before = read_metrics(run / "metrics.jsonl")
    train(tiny(texts, run, resume=True, model=DENSE))
    assert read_metrics(run / "metrics.jsonl") == before


@pytest.mark.slow
def test_what_a_run_writes(straight):
    rows = read_metrics(straight / "metrics.jsonl")
    steps, losses = curve(rows, "loss")
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all(row["tokens_per_s"] > 0 for row in rows if "loss" in row)
    assert losses[0] == pytest.approx(math.log(257), rel=0.1)
    assert losses[-1] < losses[0]
    assert curve(rows, "val_loss")[0] == [2, 4, 6]
    assert not any("loss" in row and "val_loss" in row for row in rows)

    description = json.loads((straight / "run.json").read_text())
    assert description["config"]["model"]["nsa"]["block_size"] == 4
    assert description["versions"]["jax"] == jax.__version__
    assert description["data"]["val_documents"] == 1
    assert 0 < description["unigram_loss"] < math.log(256)
    assert description["result"]["val_loss"] == rows[-1]["val_loss"]

    assert sorted(child.name for child in (straight / "checkpoints").iterdir()) == ["3", "6"]
    for picture in ("loss.png", "blocks.png"):
        pixels = imread(straight / picture)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05


def test_full_attention_has_no_picture_of_blocks(dense):
    files = {child.name for child in dense.iterdir()}
    assert files == {"metrics.jsonl", "run.json", "loss.png", "checkpoints"}


def test_default_folder_names_the_run():
    config = PRESETS["tiny"]
    assert config.run_folder == Path("runs/tiny-nsa-seed0")
    config = dataclasses.replace(config, seed=3, model=DENSE)
    assert config.run_folder == Path("runs/tiny-full-seed3")


def test_step_learns_and_donates_its_state(texts):
    """In a hundred steps on one batch, the loss falls far below that of a uniform guess."""
    model = dataclasses.replace(DENSE, dropout_rate=0.0)
    config = tiny(texts, Path("unused"), model=model, decay_steps=100)
    graphdef, params = init_model(model, 0)
    state = init_state(params, config)
    step = make_train_step(graphdef, config)
    tokens = jnp.asarray([[256, *b"she sells sea shells on the sea "[:31]]] * 2, jnp.int32)
    metrics = None
    for _ in range(100):
        before = state
        state, metrics = step(state, tokens, jnp.ones_like(tokens))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert metrics is not None
    assert float(metrics.loss) < 1.0


def test_loss_by_hand():
    logits = np.random.default_rng(0).normal(size=(2, 6, 257)).astype(np.float32)
    tokens = np.asarray([[256, 5, 6, 256, 7, 0], [9, 256, 1, 2, 3, 4]], np.int32)
    segment_ids = np.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]], np.int32)
    wide = logits.astype(np.float64)
    log_probabilities = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    # These are (sequence, position) of queries; the last token of a segment predicts nothing.
    predicting = [(0, 0), (0, 1), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4)]
    expected = -sum(log_probabilities[b, t, tokens[b, t + 1]] for b, t in predicting)
    total, count = next_byte_loss(
        jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(segment_ids)
    )
    assert int(count) == len(predicting)
    assert float(total) == pytest.approx(expected, rel=1e-6)


def test_no_gradient_from_what_is_not_predicted():
    tokens = jnp.asarray([[256, 5, 256, 7, 0, 0]], jnp.int32)
    segment_ids = jnp.asarray([[1, 1, 2, 2, 0, 0]], jnp.int32)
    grad = jax.grad(lambda x: next_byte_loss(x, tokens, segment_ids)[0])(jnp.zeros((1, 6, 257)))
    used = np.abs(np.asarray(grad)).sum(axis=-1)[0] > 0
    assert used.tolist() == [True, False, True, False, False, False]


def test_decay_is_on_matrices_only():
    _, params = abstract_model(MODEL)
    decayed = {
        "/".join(str(key.key) for key in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(decay_mask(params))
    }
    assert decayed["layers/attention/query/kernel"]
    assert decayed["embedding/embedding"]
    assert not decayed["norm/scale"]
    assert not decayed["layers/mlp_norm/scale"]


def test_schedule():
    config = tiny(Path("unused"), Path("unused"), warmup_steps=10, decay_steps=110)
    schedule = learning_rate_schedule(config)
    rates = [np.asarray(schedule(step)) for step in (0, 5, 10, 60, 110, 500)]
    expected = np.asarray([0, 0.5, 1, 0.55, 0.1, 0.1]) * config.learning_rate
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-9)


def test_metrics_log_drops_later_steps(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with MetricsLog(file, last_step=0) as log:
        log.write([{"step": step, "loss": step / 3} for step in range(1, 5)])
        log.write([{"step": 4, "val_loss": 1.5}])
    with MetricsLog(file, last_step=3) as log:
        log.write([{"step": 4, "loss": 9.0}])
    rows = read_metrics(file)
    assert curve(rows, "loss") == ([1, 2, 3, 4], [1 / 3, 2 / 3, 1.0, 9.0])
    assert curve(rows, "val_loss") == ([], [])


def test_selection_image_by_hand():
    config = NSAConfig(
        kernel_size=2,
        kernel_stride=2,
        block_size=2,
        topk=3,
        init_blocks=1,
        local_blocks=1,
        window_size=1,
    )
    # There are documents of three and six tokens, and padding. Block numbers are per document.
    segment_ids = np.asarray([1, 1, 1, 2, 2, 2, 2, 2, 2, 0], np.int32)
    chosen = np.full((10, 3), -1, np.int32)
    chosen[2, :2] = [0, 1]
    chosen[7, :2] = [0, 2]
    chosen[8, :3] = [0, 1, 2]
    image = selection_image(chosen, segment_ids, config, max_points=10)
    expected = np.zeros((10, 10), np.uint8)
    expected[2] = [2, 2, 3, 0, 0, 0, 0, 0, 0, 0]
    expected[7] = [0, 0, 0, 2, 2, 0, 0, 3, 0, 0]
    expected[8] = [0, 0, 0, 2, 2, 1, 1, 3, 3, 0]
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(
        selection_image(chosen, segment_ids, config, max_points=5), expected[::2, ::2]
    )


@pytest.mark.slow
def test_plots_of_many_runs_layers_and_heads(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "val_loss": 1.5}]
    plot_losses(tmp_path / "loss.png", {"nsa": rows, "full": rows[:1]}, unigram_loss=3.0)
    blocks = np.full((9, 3000, 6, NSA.topk), -1, np.int32)
    plot_blocks(tmp_path / "blocks.png", blocks, np.ones(3000, np.int32), NSA)
    for name in ("loss.png", "blocks.png"):
        assert imread(tmp_path / name).std() > 0.01


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("steps", 0),
        ("seed", -1),
        ("seed", 2**31),
        ("eval_every", 0),
        ("eval_sequences", 0),
        ("checkpoint_every", 0),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("seq_len", 1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -0.1),
        ("warmup_steps", 6),
        ("decay_steps", 0),
    ],
)
def test_bad_settings(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} must be .* got .*{value}"):
        tiny(Path("texts"), Path("out"), **{argument: value})


def test_bad_vocabulary():
    with pytest.raises(ValueError, match=r"vocab_size must be 257 .* got 300"):
        tiny(Path("texts"), Path("out"), model=dataclasses.replace(MODEL, vocab_size=300))


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(ValueError, match="resume and overwrite must not both be set"):
        tiny(Path("texts"), Path("out"), resume=True, overwrite=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_json(preset):
    config = PRESETS[preset]
    assert config.preset == preset
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


@pytest.mark.slow
def test_a_run_is_not_replaced_by_accident(texts, run):
    with pytest.raises(ValueError, match=r"out must not hold a run already, got '.*run'"):
        train(tiny(texts, run, model=DENSE))
    (run / "notes.txt").write_text("mine")
    train(tiny(texts, run, overwrite=True, steps=1, model=DENSE))
    assert (run / "notes.txt").read_text() == "mine"
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 1]
    assert [child.name for child in (run / "checkpoints").iterdir()] == ["1"]


def test_out_that_is_a_file(texts, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match=r"out must be a folder that can be made, got '.*file'"):
        train(tiny(texts, tmp_path / "file"))


def test_resume_without_a_checkpoint(texts, tmp_path):
    with pytest.raises(ValueError, match=r"resume must find a checkpoint in out, got '.*nothing'"):
        train(tiny(texts, tmp_path / "nothing", resume=True))
    assert not (tmp_path / "nothing").exists()


def test_resume_with_other_settings(texts, run):
    model = dataclasses.replace(DENSE, num_layers=3, nsa=dataclasses.replace(NSA, topk=4))
    with pytest.raises(
        ValueError,
        match=r"resume must keep the settings .* got learning_rate=0.5 \(checkpoint: 0.01\), "
        r"num_layers=3 \(checkpoint: 2\), topk=4 \(checkpoint: 3\)$",
    ):
        train(tiny(texts, run, resume=True, model=model, learning_rate=0.5))


def test_resume_with_other_data(texts, run, tmp_path):
    other = shutil.copytree(texts, tmp_path / "other")
    (other / "new.txt").write_text("one document more")
    with pytest.raises(ValueError, match=r"text must be the text of the checkpoint, got .*other"):
        train(tiny(other, run, resume=True, model=DENSE))


def test_resume_with_fewer_steps(texts, run):
    with pytest.raises(ValueError, match="steps must be at least the 6 of the checkpoint, got 4"):
        train(tiny(texts, run, resume=True, steps=4, model=DENSE))


def test_loading_a_folder_without_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint must be the folder of a run .* got '.*'"):
        load_model(tmp_path)


@pytest.mark.slow
def test_loss_that_is_not_finite(texts, tmp_path):
    with pytest.raises(FloatingPointError, match=r"must be finite, got .* at step \d: lower learn"):
        train(tiny(texts, tmp_path, learning_rate=1e38, warmup_steps=0, model=DENSE))
