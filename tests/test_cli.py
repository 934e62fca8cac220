"""The command line: commands, flags, presets, and one-line errors with exit code 2."""

import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import one_line, train_words
from training.runs import signals_at

import fsa_jax
import fsa_jax.training
from fsa_jax import LinearScaling, NSAConfig, cli
from fsa_jax.cli import main
from fsa_jax.training import PRESETS, RunStopped, TrainConfig, read_metrics
from fsa_jax.training.config import config_to_json
from fsa_jax.training.folder import write_description

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_train_prints_losses_and_paths(data, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(train_words(data, out)) == 0
    printed, said = capfd.readouterr()
    assert f"read 4 files (4 .txt) of {data}; skipped: 1 binary .dat" in said
    found = json.loads((out / "run.json").read_text())["data"]
    assert (found["read"], found["skipped"]) == ({".txt": 4}, {"binary .dat": 1})
    lines = printed.splitlines()
    assert {line.strip() for line in lines[1:-1]} == {
        str(out / name) for name in ("metrics.jsonl", "run.json", "loss.png", "checkpoints")
    }
    rows = read_metrics(out / "metrics.jsonl")
    loss = rows[-1]["val_loss"]
    assert lines[-1].startswith(f"step 2: validation loss {loss:.4f} nats/byte (")


@pytest.mark.slow
def test_train_shows_progress_as_lines_without_a_terminal(data, trained, tmp_path, capfd):
    run = shutil.copytree(trained, tmp_path / "run")
    assert main(["train", "--resume", "--out", str(run), "--steps", "3"]) == 0
    captured = capfd.readouterr()
    assert "step 3/3: validation loss " in captured.err
    assert "\r" not in captured.err
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize(
    ("words", "preset"),
    [([], "tiny"), (["--preset", "small"], "small"), (["--seed", "0", "--preset=small"], "small")],
)
def test_presets(configs, words, preset):
    assert main(["train", *words]) == 0
    assert configs == [PRESETS[preset]]


def test_the_file_of_another_run_gives_the_defaults(configs, tmp_path, capfd):
    """Also those of sizes and of options of the model; flags win."""
    first = "train --steps 7 --freeze embedding --attention full --num-heads 2 --qk-norm --out a"
    assert main(first.split()) == 0
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"config": config_to_json(configs[0])}))
    assert main(["train", "--config", str(file), "--seed", "3", "--num-heads", "4"]) == 0
    before, now = configs
    assert now.model.num_heads == 4
    assert now.model.qk_norm
    expected = dataclasses.replace(before, seed=3, config=file, out=None, model=now.model)
    assert now == expected
    capfd.readouterr()
    assert main(["train", "--config", str(file), "--preset", "tiny"]) == 2
    assert "preset and config must not both be given" in one_line(capfd)
    for wrong in (tmp_path / "none.json", tmp_path):
        assert main(["train", "--config", str(wrong)]) == 2
        assert "config must be the run.json of a run, got " in one_line(capfd)
    file.write_text('{"config": {"steps": 3}}')
    assert main(["train", "--config", str(file)]) == 2
    assert "config must be the run.json of a run, got " in one_line(capfd)


def test_flags_override_the_preset(configs, capfd):
    words = "--attention full --topk 5 --text a b --out c --no-tie-embeddings --preset small"
    assert main(["train", *words.split(), "--learning-rate", "0.5", "--resume"]) == 0
    small = PRESETS["small"]
    model = dataclasses.replace(
        small.model,
        attention="full",
        tie_embeddings=False,
        nsa=dataclasses.replace(small.model.nsa, topk=5),
    )
    assert configs == [
        dataclasses.replace(
            small,
            text=(Path("a"), Path("b")),
            out=Path("c"),
            learning_rate=0.5,
            resume=True,
            model=model,
        )
    ]
    assert capfd.readouterr().out == (
        "wrote:\n  a/b.png\n"
        "step 1: validation loss 1.2500 nats/byte (1.8034 bits/byte); unigram model 3.5000\n"
    )


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ("--embed-dim 64 --num-heads 2", (2, 32, 192)),
        ("--embed-dim=96 --num-heads=3", (1, 32, 288)),
        ("--embed-dim 64 --mlp-dim 100", (2, 16, 100)),
        ("--mlp-dim 100", (2, 32, 100)),
    ],
)
def test_sizes_that_follow_from_a_flag(configs, words, sizes):
    assert main(["train", *words.split()]) == 0
    model = configs[0].model
    assert (model.num_kv_heads, model.head_dim, model.mlp_dim) == sizes


def test_info(capfd):
    assert main(["info"]) == 0
    out = capfd.readouterr().out
    for word in ("python", "jax", "jaxlib", "flax", "fsa-jax", "cpu:0"):
        assert word in out
    for function, (implementation, reason) in fsa_jax.explain().items():
        assert any(
            line.split()[:2] == [function, implementation] and line.endswith(reason)
            for line in out.splitlines()
        )


def test_version_and_help(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"fsa-jax {fsa_jax.__version__}\n"
    for words in ([], ["--help"]):
        assert main(words) == 0
        out = capfd.readouterr().out
        assert all(f"  {command} " in out for command in ("train", "sample", "info"))
    for words, flags in (
        (["train", "--help"], ("--text", "--attention", "--topk", "--num-layers", "--resume")),
        (["sample", "--help"], ("--checkpoint", "--max-bytes", "--top-p", "--stop")),
        (["info", "--help"], ("implementation",)),
    ):
        assert main(words) == 0
        out = capfd.readouterr().out
        assert all(flag in out for flag in flags)


def test_console_script_without_traceback(tmp_path):
    got = subprocess.run(
        [
            sys.executable,
            "-m",
            "fsa_jax.cli",
            "train",
            "--text",
            "/no/such/path",
            "--out",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert got.returncode == 2
    assert got.stdout == ""
    assert got.stderr == (
        "fsa-jax: error: text must be files or folders that exist, got '/no/such/path'\n"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("nonsense", "'nonsense'"),
        ("train --no-such-flag 3", "--no-such-flag"),
        ("train --steps", "--steps"),
        ("train --steps many", "--steps: invalid literal for int() with base 10: 'many'"),
        ("train --steps 0", "steps must be an integer of at least 1, got 0"),
        ("train --attention sparse", "'sparse' for argument '--attention'. Expected one of"),
        ("train --preset huge", "'huge' for argument '--preset'. Expected one of"),
        (
            "train --topk 2",
            "topk must be at least init_blocks + local_blocks, got topk=2, init_blocks=1",
        ),
        ("train --num-kv-heads 3", "num_heads=4 and num_kv_heads=3"),
        ("train --sequence-axis foo", "sequence_axis must be None in a run, whose mesh says"),
        ("train --learning-rate -1", "learning_rate must be positive and finite, got -1.0"),
        ("train --resume --out /no/such/run", "resume must find a checkpoint in out, got"),
        ("sample", "--checkpoint"),
        ("sample --checkpoint /no/such/run", "got '/no/such/run'"),
        ("info --verbose", "--verbose"),
    ],
)
def test_mistakes_end_with_one_line(words, expected, capfd):
    assert main(words.split()) == 2
    assert expected in one_line(capfd)


def test_no_text_found(tmp_path, capfd):
    assert main(["train", "--text", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "text must hold at least two bytes, got fewer in " in one_line(capfd)


def test_implementation_that_cannot_serve(data, tmp_path, capfd):
    words = [word if word != "full" else "nsa" for word in train_words(data, tmp_path / "run")]
    assert main([*words, "--implementation", "triton"]) == 2
    assert "implementation='triton'" in one_line(capfd)


def test_resume_with_other_flags(data, trained, tmp_path, capfd):
    run = shutil.copytree(trained, tmp_path / "run")
    assert main(train_words(data, run, "--resume", "--mlp-dim", "8")) == 2
    assert "got mlp_dim=8 (checkpoint: 16)" in one_line(capfd)


@pytest.fixture
def described(tmp_path, monkeypatch):
    """Returns what puts the run.json of a run, and the sign of a checkpoint, into a folder."""
    monkeypatch.chdir(tmp_path)

    def describe(folder: str, config: TrainConfig) -> Path:
        (tmp_path / folder / "checkpoints" / "3").mkdir(parents=True)
        write_description(tmp_path / folder, {"config": config_to_json(config)})
        return tmp_path / folder

    return describe


HYBRID = dataclasses.replace(
    PRESETS["tiny"],
    text=(Path("a"),),
    steps=7,
    decay_steps=90,
    seed=5,
    learning_rate=0.25,
    mesh="data=1",
    model=dataclasses.replace(
        PRESETS["tiny"].model,
        num_layers=2,
        layer_types=("nsa", "window"),
        nsa=NSAConfig(local_blocks=0, topk=2),
        rope_scaling=LinearScaling(factor=2.0),
        gate_bias=True,
        gate_bias_init=(0.5, 0.0, -0.5),
    ),
)


@pytest.mark.parametrize("words", ["--out run", "--out=run --preset tiny"])
def test_a_resumed_run_keeps_its_settings(configs, described, words):
    described("run", dataclasses.replace(HYBRID, overwrite=True, distributed=True))
    assert main(["train", "--resume", *words.split()]) == 0
    assert configs == [dataclasses.replace(HYBRID, resume=True, out=Path("run"))]


def test_flags_change_a_resumed_run(configs, described):
    described("run", HYBRID)
    words = "--steps 8 --topk 1 --num-heads 2 --mesh data=2"
    assert main(["train", "--resume", "--out", "run", *words.split()]) == 0
    config = configs[0]
    assert (config.steps, config.decay_steps, config.mesh) == (8, 90, "data=2")
    assert config.model.nsa == dataclasses.replace(HYBRID.model.nsa, topk=1)
    assert (config.model.num_heads, config.model.head_dim) == (2, 64)
    assert config.model.layer_types == HYBRID.model.layer_types


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("tiny-nsa-seed0", ""),
        ("small-full-seed3", "--preset small --attention full --seed 3"),
        ("tiny-hybrid-seed0", "--num-layers 2 --layer-types nsa full"),
        ("tiny-full-seed0", "--num-layers 2 --layer_types full full"),
    ],
)
def test_the_run_that_is_resumed_without_out(configs, described, folder, words):
    preset = PRESETS[folder.partition("-")[0]]
    described(f"runs/{folder}", dataclasses.replace(preset, steps=7))
    assert main(["train", "--resume", *words.split()]) == 0
    assert configs[0].steps == 7
    assert configs[0].run_folder == Path("runs") / folder
    assert main(["train", *words.split()]) == 0
    assert configs[1].steps == preset.steps


def test_another_preset_is_not_that_of_the_run(configs, described):
    described("run", HYBRID)
    assert main(["train", "--resume", "--out", "run", "--preset", "small"]) == 0
    small = dataclasses.replace(PRESETS["small"], resume=True, out=Path("run"))
    assert configs == [small]


@pytest.mark.parametrize("text", [None, "{", '{"config": 3}', '{"what": "fsa-jax train"}'])
def test_a_run_without_settings(configs, described, capfd, text):
    run = described("run", HYBRID)
    (run / "run.json").unlink() if text is None else (run / "run.json").write_text(text)
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert configs == [dataclasses.replace(PRESETS["tiny"], resume=True, out=run)]
    assert f"{run / 'run.json'} cannot be read: flags that" in capfd.readouterr().err


@pytest.mark.parametrize("missing", ["grain", "matplotlib.figure", "orbax.checkpoint", "tyro"])
def test_missing_extra(missing, monkeypatch, capfd):
    # Both patches are undone afterwards, so other tests patch the module that is imported.
    monkeypatch.setattr(fsa_jax, "training", fsa_jax.training)
    for name in list(sys.modules):
        if name.startswith("fsa_jax.training"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["train"]) == 2
    message = one_line(capfd)
    assert missing.partition(".")[0] in message
    assert "in a clone of fsa-jax, pip install '.[train]' installs it" in message
    assert main(["info"]) == 0


def test_interrupt(monkeypatch, capfd):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(fsa_jax.training, "train", interrupt)
    assert main(["train"]) == 130
    assert one_line(capfd) == "fsa-jax: error: interrupted\n"


@pytest.mark.parametrize(
    ("number", "saved", "words", "code", "expected"),
    [
        ("SIGINT", 4, "--out 'a b' --overwrite", 130, "Go on with: fsa-jax train --out 'a b' --re"),
        ("SIGTERM", 7, "--resume --out c", 143, "Go on with: fsa-jax train --out c --resume\n"),
        ("SIGHUP", None, "", 129, "before the first step; the same command starts the run"),
    ],
)
def test_a_signal_says_how_to_go_on(number, saved, words, code, expected, monkeypatch, capfd):
    def stop(config):
        raise RunStopped(getattr(signal, number), saved, trained=saved is not None)

    monkeypatch.setattr(fsa_jax.training, "train", stop)
    assert main(["train", *shlex.split(words)]) == code
    message = one_line(capfd)
    assert message.startswith(f"fsa-jax: {number}: ended")
    assert expected in message
    assert (f"the checkpoint of step {saved} is saved" in message) == (saved is not None)


@pytest.mark.slow
def test_the_command_that_goes_on_does(data, tmp_path, monkeypatch, capfd):
    signals_at(monkeypatch, 2, signal.SIGTERM)
    words = train_words(data, tmp_path / "run", "--overwrite", "--steps", "3")
    assert main(words) == 143
    monkeypatch.undo()
    command = capfd.readouterr().err.splitlines()[-1].partition("Go on with: ")[2]
    assert main(shlex.split(command)[1:]) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize("command", ["train", "sample", "bench", "tune", "info"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), "[Errno 30] Read-only file system"),
        (OSError("orbax: a\n  long story"), "orbax: a long story"),
        (PermissionError(errno.EACCES, "Permission denied", "c"), "c: Permission denied"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), None),
    ],
)
def test_errors_of_files_are_one_line(command, error, expected, monkeypatch, capfd):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, f"_{command}", fail)
    assert main([command]) == 1
    if expected is None:
        assert capfd.readouterr() == ("", "")
    else:
        assert one_line(capfd) == f"fsa-jax: error: {expected}\n"


@pytest.mark.parametrize("words", ["bench --out", "bench --report {0}/x --out", "tune --out"])
def test_a_path_through_a_file(words, tmp_path, capfd):
    (tmp_path / "file").write_text("text")
    words = words.format(tmp_path).split()
    assert main([*words, str(tmp_path / "file" / "x")]) in (1, 2)
    assert str(tmp_path) in one_line(capfd)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--out", ""],
        ["train", "--out="],
        ["train", "--text", "a", ""],
        ["sample", "--checkpoint", ""],
        ["bench", "--report", ""],
        ["bench", "--peer-path="],
        ["tune", "--out", ""],
    ],
)
def test_an_empty_path_is_no_path(words, capfd):
    """Python would interpret an empty path as the current directory."""
    assert main(words) == 2
    flag = next(word for word in words if word.startswith("--")).rstrip("=")
    assert re.search(rf"{flag}.*''|'' .*{flag}", one_line(capfd))


@pytest.mark.slow
def test_failed_training_exits_with_1(data, tmp_path, capfd):
    words = train_words(data, tmp_path / "run", "--learning-rate", "1e38", "--warmup-steps", "0")
    assert main([*words, "--steps", "4"]) == 1
    *progress, last = capfd.readouterr().err.splitlines()
    assert last.startswith("fsa-jax: error: loss and gradient must be finite")
    assert "lower learning_rate" in last
    assert not any("Traceback" in line for line in progress)


def test_the_version_and_help_wait_for_no_large_package():
    """Start-up time is import time, so these commands must not import large packages."""
    code = """
import sys
from fsa_jax.cli import main
def loaded():
    return {"jax", "flax", "numpy", "tyro", "grain", "matplotlib", "orbax"} & {*sys.modules}
for words in (["--version"], ["--help"], ["info", "--help"]):
    assert main(words) == 0
    assert not loaded(), (words, loaded())
assert main(["sample", "--help"]) == 0
assert not loaded() & {"jax", "flax"}, loaded()
assert main(["train", "--help"]) == 0
assert not loaded() & {"grain", "matplotlib"}, loaded()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize(
    ("words", "unbuffered"), [(["train", "--help"], ""), (["info"], "1"), (["--help"], "")]
)
def test_a_reader_that_is_gone_is_no_error(words, unbuffered):
    """A closed pipe, as in `fsa-jax info | head -1` once head has its line, is not an error."""
    reader, writer = os.pipe()
    os.close(reader)
    got = subprocess.run(
        [sys.executable, "-m", "fsa_jax.cli", *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert got.stderr == ""
    assert got.returncode == 1
