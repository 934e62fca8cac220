"""`save_pretrained`: a folder with a config.json and safetensors from a `Transformer`.

A file is written tensor by tensor: its header follows from shapes and dtypes alone, and then each
tensor is fetched from the devices, written and dropped.
"""

import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from fsa_jax.arguments import checks
from fsa_jax.messages import naming
from fsa_jax.pretrained import config as configs
from fsa_jax.pretrained import names, read
from fsa_jax.transformer import Transformer

#: The files that a folder holds besides weights and config.json, which `like` copies.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_CODES = {dtype: code for code, dtype in read.DTYPES.items()}


class _Tensor(NamedTuple):
    """A tensor to write: its name in the file, and a layer of a parameter."""

    name: str
    param: jax.Array
    place: names.Place
    layer: int | None

    @property
    def bytes(self) -> int:
        return int(np.prod(self.place.shape)) * self.param.dtype.itemsize

    def fetch(self) -> np.ndarray:
        """The tensor, on the host."""
        part = self.param if self.layer is None else _layer_of(self.param, self.layer)
        return np.ascontiguousarray(self.place.to_tensor(np.asarray(part)))


type Progress = Callable[[int, int], object] | None


@jax.jit
def _layer_of(stack: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def save_pretrained(
    model: Transformer,
    path: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: Progress = None,
) -> None:
    """Writes a model to a folder with a config.json and safetensors, as Hugging Face does.

    A model whose layers are all dense is written for transformers, as llama, mistral, qwen2 or
    qwen3. Any other has the model type "fsa_jax", which transformers refuses: it has no code for
    the gates. `load_pretrained` reads both. docs/pretrained.md lists the names of the tensors.

    The folder is complete or not there: it is written under a temporary name beside `path`, and
    renamed.

    Args:
      model: the model; all its arrays must be on devices of this process.
      path: the folder to write.
      like: the folder that the model came from. Its tokenizer, and the keys of its config.json that
        do not concern the function, such as the ids of special tokens, are copied.
      overwrite: whether to replace the weights and the config.json of an existing folder. Its other
        files stay.
      max_shard_size: the largest size of a file, in bytes or like "5GB"; a model that is larger is
        split over several files with an index.
      progress: called after each tensor with the number of those that are written, and of all.

    Raises:
      ValueError: the path holds files and `overwrite` is not set, or it is not the folder of a
        model; no model type of transformers has the options of a dense model; an argument is wrong.
      NotImplementedError: an array of the model is on devices of another process.
      OSError: the folder cannot be written.
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"model must be a Transformer, got {type(model).__name__}")
    limit = _bytes_of(max_shard_size)
    path = Path(os.path.abspath(checks.path("path", path)))
    check_target(path, checks.flag("overwrite", overwrite))
    tensors, other = _tensors_of(model), {}
    if like is not None and not (checks.path("like", like) / configs.NAME).is_file():
        raise ValueError(f"like must be a folder with a {configs.NAME}, got {str(like)!r}")
    if like is not None:
        other = configs.read_json(Path(like) / configs.NAME)
    dtype = read.dtype_of_most((x.place.shape, str(x.param.dtype)) for x in tensors)
    config = configs.write_config(model.config, dtype, other)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        new.chmod(0o777 & ~_umask())
        _write_weights(new, tensors, limit, progress)
        _write_json(new / configs.NAME, config)
        _copy_others(path, new)
        if like is not None:
            _copy_companions(Path(like), new)
        _replace(path, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _bytes_of(size: int | str) -> int:
    if isinstance(size, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", size.strip(), flags=re.I)
        if found is None:
            raise ValueError(
                f"max_shard_size must be like '5GB' or a number of bytes, got {size!r}"
            )
        size = int(float(found[1]) * _UNITS[found[2].upper()])
    return checks.size("max_shard_size", size, most=float("inf"))


def check_target(path: Path, overwrite: bool) -> None:
    """Raises ValueError unless a folder may be written at the path."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise ValueError(f"path must be a folder or not exist, got {str(path)!r}")
    held = sorted(child.name for child in path.iterdir())
    if not held:
        return
    if not overwrite:
        raise ValueError(
            f"path must not hold files, got {str(path)!r} with {held[0]!r}: set overwrite to "
            "replace the model in it, or path to another folder"
        )
    folders = [name for name in held if not (path / name).is_file()]
    if configs.NAME not in held or folders:
        reason = f"there is no {configs.NAME}" if not folders else f"{folders[0]} is not a file"
        raise ValueError(
            f"overwrite must replace only the folder of a model, got {str(path)!r}, where {reason}"
        )


def _tensors_of(model: Transformer) -> list[_Tensor]:
    """The tensors of a model in the order of their names."""
    params = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    places = names.places(model.config, {path: leaf.shape for path, leaf in params.items()})
    found = []
    for path, place in places.items():
        param = params[path]
        if not param.is_fully_addressable:
            raise NotImplementedError(
                f"{'.'.join(path)} must be on devices of this process, got {param.sharding}"
            )
        for layer, name in enumerate(place.tensors):
            number = layer if place.stacked else None
            found.append(_Tensor(names.in_file(name), param, place, number))
    return sorted(found, key=lambda tensor: tensor.name)


def _write_weights(folder: Path, tensors: list[_Tensor], limit: int, progress: Progress) -> None:
    """Writes one file, or several and an index."""
    shards: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(tensors))

    if len(shards) == 1:
        _write_file(folder / read.SINGLE, shards[0], advance)
        return
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard, advance)
        files |= {tensor.name: name for tensor in shard}
    total = {
        "total_parameters": sum(int(np.prod(tensor.place.shape)) for tensor in tensors),
        "total_size": sum(tensor.bytes for tensor in tensors),
    }
    _write_json(folder / read.INDEX, {"metadata": total, "weight_map": dict(sorted(files.items()))})


def _write_file(path: Path, tensors: list[_Tensor], advance: Callable[[], object]) -> None:
    """Writes a safetensors file, with the layout that its own library chooses."""
    # The library sorts by the size of the elements, so that all tensors are aligned, then by name.
    tensors = sorted(tensors, key=lambda tensor: (-tensor.param.dtype.itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _CODES[str(tensor.param.dtype)],
            "shape": list(tensor.place.tensor_shape),
            "data_offsets": [start, start + tensor.bytes],
        }
        start += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with naming(path), path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            file.write(tensor.fetch().reshape(-1).view(np.uint8))
            advance()
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with naming(path):
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_others(old: Path, new: Path) -> None:
    """Keeps the files of a folder that is replaced, other than its weights and config.json."""
    for path in old.iterdir() if old.is_dir() else ():
        if path.name != configs.NAME and not _WEIGHTS.fullmatch(path.name):
            shutil.copy2(path, new / path.name)


def _copy_companions(old: Path, new: Path) -> None:
    for name in COMPANIONS:
        if (old / name).is_file():
            shutil.copyfile(old / name, new / name)


def _replace(path: Path, new: Path) -> None:
    """Renames the new folder to the path, and deletes what was there only after that."""
    if not os.path.lexists(path):
        new.rename(path)
        return
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    old = holder / path.name
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        holder.rmdir()
        raise
    shutil.rmtree(holder, ignore_errors=True)


def _umask() -> int:
    """The process's mask of file modes, which mkdtemp does not follow."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
