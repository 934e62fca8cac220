"""Folders of checkpoints for tests: those that transformers wrote, and changed copies of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file
from util import assert_same_bits

#: Random weights in float32, written by transformers 5.24.0, each with `expected.npz`: input_ids
#: int32 [2, 150]; positions, 8 of the 150; logits float32 [2, 8, V] at those; loss, the mean
#: next-token cross-entropy over all but the first token of each sequence; `grad.<name>` for some
#: tensors. Weights and arithmetic were float64, tables of RoPE float32.
DATA = Path(__file__).parent.parent / "data" / "hf"
LLAMA = DATA / "llama3"
#: Deletes a key.
ABSENT: Any = object()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, by their names in the files."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def changed(
    target: Path,
    source: Path = LLAMA,
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray] | None] | None = None,
    **config: Any,
) -> Path:
    """A copy of a folder with other keys in config.json and, by `change`, other tensors."""
    target.mkdir()
    values = config_of(source) | config
    values = {key: value for key, value in values.items() if value is not ABSENT}
    (target / "config.json").write_text(json.dumps(values))
    if change is None:
        for file in source.glob("model*"):
            shutil.copy(file, target)
        return target
    tensors = tensors_of(source)
    tensors = change(tensors) or tensors
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, target / "model.safetensors", {"format": "pt"})
    return target


def params_of(model) -> dict[tuple[str, ...], Any]:
    """The parameters of a model by their paths."""
    return nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def same(one, other) -> None:
    """Asserts that two models have the same parameters, to the bit."""
    one, other = params_of(one), params_of(other)
    assert one.keys() == other.keys()
    assert_same_bits(one, other)
