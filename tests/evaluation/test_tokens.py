"""Evaluations of models of the tokens of a tokenizer.json: runs, folders, and their text."""

import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import one_line, train_words

from fsa_jax.cli import main
from fsa_jax.evaluation import open_model
from fsa_jax.evaluation.tasks import Samples
from fsa_jax.evaluation.text import pack, read_text
from fsa_jax.training import load_tokenizer, write_tokens
from fsa_jax.training.text import open_documents

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "tests" / "data" / "hf" / "llama3"
TOKENIZER = load_tokenizer(str(LLAMA))
BEGIN, END = TOKENIZER.begin, TOKENIZER.end
SMALL = ["--lengths", "64", "--depths", "0", "1", "--samples", "2", "--answer-digits", "2"]

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Keeps the tokens of these texts out of the cache of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(cache, data, tmp_path_factory) -> Path:
    """Returns the folder of a run on the tokens of two texts with weights."""
    folder = tmp_path_factory.mktemp("tokens")
    lines = [json.dumps({"body": f"café {i} of {i % 7} " * 5}) + "\n" for i in range(40)]
    (folder / "records.jsonl").write_text("".join(lines))
    out = folder / "run"
    words = ["--tokenizer", str(LLAMA), "--text-column", "body", "--text-weights", "1", "3"]
    words = train_words(data, out, *words)
    words.insert(words.index(str(data)) + 1, str(folder / "records.jsonl"))
    assert main(words) == 0
    return out


def encode(text: str) -> list[int]:
    return TOKENIZER.encode([text.encode()])[0].tolist()


def result(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def test_the_loss_of_a_run_on_tokens_is_its_validation_loss(run):
    assert main(["eval", str(run), "--tasks", "loss", "--sequences", "2"]) == 0
    values = result(Path("evaluations/run"))
    described = json.loads((run / "run.json").read_text())
    whole = values["loss"]["all"]
    (mine,) = whole["models"]
    # Float32 sums in another order.
    assert mine["loss"] == pytest.approx(described["result"]["val_loss"], rel=1e-6)
    wanted = described["result"]["val_bits_per_byte"]
    assert mine["bits_per_byte"] == pytest.approx(wanted, rel=1e-6)
    for name in ("tokens", "bytes"):
        assert sum(row[name] for row in values["loss"]["buckets"]) == whole[name]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (whole["tokens"], whole["bytes"]) == (last["val_tokens"], last["val_bytes"])
    assert values["text"]["bytes"] == described["data"]["val_bytes"]
    assert values["models"][0]["tokenizer"] == TOKENIZER.fingerprint


@pytest.mark.slow
def test_a_folder_of_hugging_face_beside_a_run(run, tmp_path):
    out = tmp_path / "out"
    words = ["eval", str(LLAMA), str(run), "--text", str(ROOT / "README.md"), "--seq-len", "64"]
    assert main([*words, "--sequences", "3", *SMALL, "--out", str(out)]) == 0
    values = result(out)
    text = (ROOT / "README.md").read_bytes()
    assert (values["text"]["documents"], values["text"]["bytes"]) == (1, len(text))
    assert values["text"]["tokens"] == len(encode(text.decode()))
    for row in (*values["loss"]["buckets"], values["loss"]["all"]):
        for mine in row["models"]:
            bits = mine["loss"] * row["tokens"] / row["bytes"] / math.log(2)
            assert mine["bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    sequences = pack(read_text([], [ROOT / "README.md"], TOKENIZER), seq_len=64, limit=3)
    logits = open_model(LLAMA).model(sequences.tokens, sequences.segment_ids)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    wanted = np.take_along_axis(log_p, sequences.targets[..., None], axis=-1)[..., 0]
    wanted = -wanted[sequences.counted].mean()
    assert values["loss"]["all"]["models"][0]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert values["loss"]["all"]["bytes"] > values["loss"]["all"]["tokens"]
    for task in ("recall", "needle"):
        assert all(np.isfinite(x["log_probability"]) for x in values[task]["all"]["models"])


def test_samples_are_tokens_of_the_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text("It was a bright cold day in April. " * 30)
    text = read_text([], [tmp_path / "text.txt"], TOKENIZER)
    for task in ("recall", "needle"):
        sample = Samples(text, seed=0, digits=5).make(task, 200, 0.5, 0)
        assert sample.prompt[0] == BEGIN
        assert END not in sample.prompt
        assert 150 < len(sample.prompt) + len(sample.answer) <= 200
        stream = TOKENIZER.stream(())
        prompt = "".join(map(stream.add, sample.prompt[1:].tolist()))
        digits = "".join(map(stream.add, sample.answer.tolist()))
        assert sample.answer.tolist() == encode(digits)
        question = prompt[prompt.rindex("\n") + 1 :]
        assert f"\n{question}{digits}\n" in prompt


def test_least_lengths_of_recall_hold_where_questions_differ_in_length():
    text = read_text([], [LLAMA / "config.json"], TOKENIZER)
    maker = Samples(text, seed=0, digits=5)
    for length in range(10, 30):
        with pytest.raises(ValueError, match="lengths must hold 2 keys") as found:
            maker.make("recall", length, 0.5, 0)
        assert int(re.findall(r"\d+ tokens or more", str(found.value))[0].split()[0]) > length
    maker.make("recall", 80, 0.5, 0)


def tokens_of(documents) -> list[list[int]]:
    lengths = np.diff(documents.ends, prepend=0).tolist()
    return [documents.part(i, 0, length).tolist() for i, length in enumerate(lengths)]


def test_a_single_document_is_whole(tmp_path):
    text = "A document of one file. " * 9
    (one := tmp_path / "one.txt").write_text(text)
    (tmp_path / "copy.txt").write_text(text)
    wanted = [[BEGIN, *encode(text), END]]
    for paths in ([one], [one, tmp_path / "copy.txt"]):
        assert tokens_of(open_documents(paths, tokenizer=TOKENIZER)[0]) == wanted
    write_tokens(tmp_path / "tokens", [np.asarray(wanted[0])], vocab_size=510)
    found, source = open_documents([tmp_path / "tokens"], tokenizer=TOKENIZER)
    assert tokens_of(found) == wanted
    assert source == str(tmp_path / "tokens")
    assert read_text([], [tmp_path / "tokens"], TOKENIZER).stretch.tolist() == encode(text)


def test_two_records_are_not_one_document(tmp_path):
    (file := tmp_path / "two.jsonl").write_text('{"body": "one text"}\n{"body": "another"}\n')
    for name in ("bytes", str(LLAMA)):
        tokenizer = load_tokenizer(name)
        text = read_text([], [file], tokenizer, column="body")
        assert text.describe()["documents"] == 2
        assert text.describe()["bytes"] == len("one text" + "another")


def test_tokenizers_that_are_missing_or_others(run, tmp_path, capfd):
    bare = shutil.copytree(LLAMA, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    other = shutil.copytree(LLAMA, tmp_path / "other")
    (other / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    lost = shutil.copytree(run, tmp_path / "lost")
    (lost / "tokenizer.json").unlink()
    capfd.readouterr()
    for given, message in (
        ([bare], f"checkpoints must have a tokenizer.json in their folder, unless they are models "
         f"of bytes with a vocabulary of 257 tokens, got none in {str(bare)!r} with 512"),
        ([lost], f"got {str(lost / 'tokenizer.json')!r}: No such file"),
        ([run, other], "checkpoints must have the same tokenizer, with the same begin and end"),
    ):  # fmt: skip
        assert main(["eval", *map(str, given), "--text", str(LLAMA / "config.json")]) == 2
        assert message in one_line(capfd)
    assert open_model(run).tokenizer.fingerprint == open_model(LLAMA).tokenizer.fingerprint
