"""Words of small commands, and the check of a one-line error, for tests of the command line."""

from pathlib import Path

TEXT = "the quick brown fox jumps over the lazy dog. "

SIZES = """
    --attention full --num-layers 1 --embed-dim 16 --num-heads 2 --num-kv-heads 1 --head-dim 8
    --mlp-dim 16 --batch-size 2 --seq-len 32 --eval-sequences 2 --warmup-steps 1 --decay-steps 9
"""


def train_words(data: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--text", str(data), "--out", str(out), "--steps", "2", *SIZES.split(), *more]


def one_line(capfd) -> str:
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err
