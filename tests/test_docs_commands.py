"""The commands of a page of the documentation run as written."""

import shlex
from pathlib import Path

import pytest

from fsa_jax.cli import main

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/dense-to-sparse.md").read_text(encoding="utf-8")
PROGRAM = "    uv run fsa-jax "


def commands(heading: str) -> list[list[str]]:
    """Arguments of the commands under a heading of the page."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith(PROGRAM)]
    return [shlex.split(line.removeprefix(PROGRAM)) for line in lines]


@pytest.mark.slow
def test_a_folder_of_hugging_face_becomes_sparse(tmp_path, monkeypatch):
    """All five commands, in a folder that looks like a clone."""
    for name in ("tests", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    found = commands("A folder of Hugging Face")
    assert [x[0] for x in found] == ["convert", "train", "eval", "sample", "convert"]
    for arguments in found:
        assert main(arguments) == 0
    assert (tmp_path / "models/continued/model.safetensors").exists()
    assert (tmp_path / "evaluations/llama3/evaluation.json").exists()
