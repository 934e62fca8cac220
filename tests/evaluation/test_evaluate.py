"""Whole evaluations: the numbers of runs, models side by side, the files, and bad input."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import one_line
from flax import nnx
from matplotlib.image import imread

from fsa_jax import NSAConfig
from fsa_jax.cli import main
from fsa_jax.evaluation import EvalConfig, evaluate, open_model
from fsa_jax.evaluation.text import read_text
from fsa_jax.pretrained import save_pretrained
from fsa_jax.training import load_corpus, load_tokenizer
from fsa_jax.transformer import Transformer, TransformerConfig

LLAMA = Path(__file__).parents[1] / "data" / "hf" / "llama3"
WORDS = b"A document of one file. " * 9
LOSS = ["--tasks", "loss", "--sequences", "2"]
#: Retrieval that takes one program for each model.
SMALL = ["--lengths", "64", "--depths", "0", "1", "--samples", "3", "--answer-digits", "1"]

pytestmark = pytest.mark.usefixtures("elsewhere")


def result(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def other_model(folder: Path, **changes) -> Path:
    """Writes an untrained model of bytes in the files of Hugging Face."""
    sizes = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = TransformerConfig(**{"vocab_size": 257, "mlp_dim": 16, **sizes, **changes})
    save_pretrained(Transformer(config, rngs=nnx.Rngs(3)), folder)
    return folder


def test_the_loss_of_a_run_is_its_validation_loss(trained, capfd):
    assert main(["eval", str(trained), *LOSS]) == 0
    printed, said = capfd.readouterr()
    folder = Path("evaluations") / trained.name
    values, run = result(folder), json.loads((trained / "run.json").read_text())
    whole = values["loss"]["all"]["models"][0]
    # Float32 sums in another order.
    assert whole["loss"] == pytest.approx(run["result"]["val_loss"], rel=1e-6)
    assert whole["bits_per_byte"] == pytest.approx(run["result"]["val_bits_per_byte"], rel=1e-6)
    assert values["loss"]["all"]["tokens"] == sum(x["tokens"] for x in values["loss"]["buckets"])
    assert values["text"]["bytes"] == run["data"]["val_bytes"]
    assert values["text"]["bytes_per_token"] == 1
    (model,) = values["models"]
    assert (model["step"], model["parameters"], model["attention"]) == (
        2,
        run["parameters"],
        "full",
    )
    assert values["arguments"]["seq_len"] == 32
    assert {"commit", "versions", "devices", "date"} <= set(values)
    names = ("evaluation.json", "evaluation.md", "loss.png")
    assert printed.splitlines()[-3:] == [f"  {folder / name}" for name in names]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert f"| {whole['loss']:.4f} ± " in table[-1]
    assert "\n".join(table) in (folder / "evaluation.md").read_text()
    assert said == f"fsa-jax: {trained.name}: loss of 2 sequences of 32 tokens\n"


@pytest.mark.slow
def test_models_side_by_side_see_the_same_samples(trained, data, tmp_path):
    other = other_model(tmp_path / "other", attention="full")
    out = tmp_path / "out"
    words = ["eval", str(trained), str(other), str(trained), "--text", str(data), *SMALL]
    assert main([*words, "--out", str(out)]) == 0
    values = result(out)
    assert [model["label"] for model in values["models"]] == [
        f"{trained.name} (1)",
        "other",
        f"{trained.name} (3)",
    ]
    assert values["models"][1]["step"] is None
    corpus = load_corpus([data])
    assert values["text"]["bytes"] == sum(map(len, (*corpus.train, *corpus.validation)))
    for row in (*values["loss"]["buckets"], values["loss"]["all"]):
        first, second, again = row["models"]
        assert second["difference"] == pytest.approx(second["loss"] - first["loss"], abs=1e-9)
        assert again == first | {"difference": 0.0, "difference_standard_error": 0.0}
    for task in ("recall", "needle"):
        assert [(x["length"], x["depth"]) for x in values[task]["cells"]] == [(64, 0), (64, 1)]
        for cell in values[task]["cells"]:
            first, second, again = cell["models"]
            assert first["each"] == again["each"]
            assert again["log_probability_difference"] == 0
            pairs = [model["each"]["log_probability"] for model in (first, second)]
            gap = np.subtract(*reversed(pairs))
            assert second["log_probability_difference"] == pytest.approx(gap.mean())
            error = gap.std(ddof=1) / np.sqrt(3)
            assert second["log_probability_difference_standard_error"] == pytest.approx(error)
            assert first["exact_match"] == np.mean(first["each"]["exact_match"])
        assert values[task]["all"]["samples"] == 6
        assert values[task]["chance"] == {"exact_match": 0.1, "log_probability": -np.log(10)}
    for name in ("loss", "retrieval-1", "retrieval-2", "retrieval-3"):
        assert imread(out / f"{name}.png").std() > 0.01
    page = (out / "evaluation.md").read_text()
    assert f"other - {trained.name} (1)" in page
    assert page.count(".png)") == 4

    # The same numbers again, and a smaller evaluation leaves nothing of the larger one.
    again = evaluate(EvalConfig(checkpoints=(trained,), text=(data,), tasks=("loss",), out=out,
                                overwrite=True))  # fmt: skip
    kept = result(out)
    assert kept == json.loads(json.dumps(again.values))
    assert kept["loss"]["all"]["models"][0] == values["loss"]["all"]["models"][0]
    assert sorted(x.name for x in out.iterdir()) == sorted(x.name for x in again.files)


@pytest.mark.slow
def test_a_dense_model_beside_a_sparse_and_a_hybrid_one(trained, data, tmp_path):
    nsa = NSAConfig(kernel_size=4, kernel_stride=2, block_size=4, topk=3, init_blocks=1,
                    local_blocks=1, window_size=6)  # fmt: skip
    sparse = other_model(tmp_path / "sparse", nsa=nsa)
    types = ("full", "nsa")
    hybrid = other_model(tmp_path / "hybrid", nsa=nsa, num_layers=2, layer_types=types)
    config = EvalConfig(
        checkpoints=(trained, sparse, hybrid),
        text=(data,),
        out=tmp_path / "out",
        lengths=(64,),
        depths=(0.5,),
        samples=2,
    )
    found = evaluate(config).values
    assert [model["attention"] for model in found["models"]] == ["full", "nsa", "hybrid"]
    for model in found["needle"]["cells"][0]["models"]:
        assert -50 < model["log_probability"] < -15  # untrained: five times log 257 is 28
    for model in found["loss"]["all"]["models"]:
        assert abs(model["loss"] - np.log(257)) < 0.5


def test_what_an_evaluation_may_replace(trained, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    words = ["eval", str(trained), *LOSS, "--out", str(out)]
    assert main(words) == 0
    (out / "notes.txt").write_text("mine")
    old = (out / "evaluation.json").read_text()
    capfd.readouterr()
    assert main(words) == 2
    assert "out must be a new folder or an empty one, got" in one_line(capfd)
    assert main([*words, "--overwrite", "--seq-len", "16"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    new = (out / "evaluation.json").read_text()
    assert new != old
    # A run that fails leaves the old evaluation as it is.
    monkeypatch.setattr("fsa_jax.evaluation.folder.plot_loss", _full_disk)
    capfd.readouterr()
    assert main([*words, "--overwrite"]) == 1
    assert "No space left on device" in capfd.readouterr().err
    assert (out / "evaluation.json").read_text() == new
    assert len(list(out.iterdir())) == 4


def _full_disk(path: Path, values: dict) -> None:
    raise OSError(28, "No space left on device")


def test_folders_of_others_are_not_replaced(trained, tmp_path, capfd):
    for folder in (tmp_path, trained):
        kept = sorted(folder.iterdir())
        (tmp_path / "evaluation.json").write_text('{"mine": 1}')
        assert main(["eval", str(trained), *LOSS, "--out", str(folder), "--overwrite"]) == 2
        assert "overwrite must replace only an evaluation that this program" in one_line(capfd)
        assert set(kept) <= set(folder.iterdir())
    assert (tmp_path / "evaluation.json").read_text() == '{"mine": 1}'
    assert main(["eval", str(trained), *LOSS, "--out", str(tmp_path / "evaluation.json")]) == 2
    assert "out must be a folder, got" in one_line(capfd)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seq-len", "4000"], "seq_len must be at most the"),
        (["--lengths", "30"], "lengths must hold 2 keys with their values"),
        (["--lengths", "50", "--tasks", "needle"], "lengths must hold the needle, the question"),
        (["--lengths", "9999"], "lengths must be at most"),
        (["--lengths", "64", "64"], "lengths must differ from one another, got (64, 64)"),
        (["--depths", "1.5"], "depths must be from 0 to 1, got 1.5"),
        (["--depths"], "depths must hold at least one number"),
        (["--samples", "0"], "samples must be an integer of at least 1, got 0"),
        (["--seed", "-1"], "seed must be an integer of at least 0, got -1"),
        (["--tasks"], "tasks must name at least one of"),
        (["--tasks", "other"], "other"),
        (["--text", "nowhere"], "text must be files or folders that exist, got 'nowhere'"),
    ],
)
def test_bad_arguments(trained, capfd, words, message):
    assert main(["eval", str(trained), *words]) == 2
    assert message in one_line(capfd)
    assert not Path("evaluations").exists()


def test_bad_checkpoints(trained, tmp_path, capfd):
    wide = other_model(tmp_path / "wide", attention="full", vocab_size=300)
    bytes_ = other_model(tmp_path / "bytes", attention="full")
    for given, message in (
        ([], "checkpoints must name at least one model, got none"),
        (["nothing"], "checkpoints must be folders of runs with a checkpoint in them, or of"),
        (
            [str(trained), str(wide)],
            "checkpoints must have a tokenizer.json in their folder, unless they",
        ),
        ([str(bytes_)], "seq_len must be given for"),
        ([str(bytes_), "--seq-len", "16"], "text must be given for"),
        ([str(trained), str(bytes_)], "text must be given for"),
    ):
        assert main(["eval", *given, "--lengths", "64"]) == 2
        assert message in one_line(capfd)
    assert not Path("evaluations").exists()


def test_models_of_different_tokenizers(trained, monkeypatch, tmp_path):
    one = open_model(trained)
    opened = iter([one, dataclasses.replace(one, tokenizer=load_tokenizer(str(LLAMA)))])
    monkeypatch.setattr("fsa_jax.evaluation.run.open_model", lambda path: next(opened))
    rule = "checkpoints must have the same tokenizer, .* 257 tokens and .* 510 of another"
    with pytest.raises(ValueError, match=rule):
        evaluate(EvalConfig(checkpoints=(trained, trained), out=tmp_path / "out"))


def test_the_validation_part_must_be_that_of_the_training(trained):
    one = open_model(trained)
    other = dataclasses.replace(one, fingerprint="of another text")
    with pytest.raises(ValueError, match=r"text must be given where .* on different texts"):
        read_text([one, other], (), one.tokenizer)
    with pytest.raises(ValueError, match=r"text must be given for .* is no longer the text of"):
        read_text([other], (), one.tokenizer)


def test_a_text_that_is_given_is_used_whole(trained, tmp_path):
    (tmp_path / "one.txt").write_bytes(WORDS)
    one = open_model(trained)
    text = read_text([one], [tmp_path / "one.txt"], one.tokenizer)
    assert text.stretch.tobytes() == np.frombuffer(WORDS, np.uint8).astype(np.int32).tobytes()
