"""Reads the tensors of a folder: what they are from the headers, and then part by part.

The library `safetensors` maps a file into memory. A file is opened anew for each parameter and
closed behind it, so that the pages that were read do not add up to a second copy of the weights.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from fsa_jax.pretrained import names

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: The dtypes of tensors that can be parameters, in the words of safetensors.
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Tensor(NamedTuple):
    """A tensor of a folder.

    Attributes:
      file: its file.
      name: its name there.
      shape: its shape.
      dtype: its dtype, in the words of safetensors.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by their canonical names, without their contents.

    Raises:
      ValueError: the folder has no safetensors; a file is missing or damaged, or does not hold what
        the index says; two tensors have the same canonical name.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        files: dict[Path, set[str] | None] = {single: None}
    elif index.is_file():
        files = dict(_files_of(index))
    else:
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" (pickled weights such as {others[0]} are not read)" if others else ""
        raise ValueError(f"path must hold {SINGLE} or {INDEX}, got {str(folder)!r}{hint}")
    found: dict[str, Tensor] = {}
    for file, listed in files.items():
        with _opened(file) as handle:
            held = set(handle.keys())
            if listed is not None and held != listed:
                name = min(held ^ listed)
                raise ValueError(
                    f"{str(index)!r} must list the tensors of each file, got {name!r} "
                    f"{'only in' if name in held else 'missing from'} {file.name!r}"
                )
            for name in sorted(held):
                part = handle.get_slice(name)
                key = names.canonical(name)
                if key in found:
                    raise ValueError(
                        f"{str(folder)!r} must hold each tensor once, got {found[key].name!r} and "
                        f"{name!r}"
                    )
                found[key] = Tensor(file, name, tuple(part.get_shape()), part.get_dtype())
    return found


def _files_of(index: Path) -> Iterator[tuple[Path, set[str]]]:
    """The files that an index lists, and the tensors of each."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, set[str]] = {}
        for name, file in listed.items():
            if not isinstance(file, str):
                raise TypeError(f"{name!r} is said to be in {file!r}")
            files.setdefault(file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} must hold a weight_map: {error!r}") from error
    for file, tensors in sorted(files.items()):
        if Path(file).name != file:
            raise ValueError(f"{str(index)!r} must name files of its own folder, got {file!r}")
        if not (index.parent / file).is_file():
            raise ValueError(f"{str(index)!r} lists {file!r}, which is missing")
        yield index.parent / file, tensors


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "np") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} must be a complete safetensors file: {error}") from error


def check_tensors(
    folder: Path, tensors: Mapping[str, Tensor], wanted: Iterable[names.Place]
) -> None:
    """Raises ValueError unless the folder holds the wanted tensors, in their shapes, and no others.

    Args:
      folder: the folder.
      tensors: what it holds.
      wanted: the places that parameters are read from.
    """
    where = str(folder)
    shapes = {name: place.tensor_shape for place in wanted for name in place.tensors}
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise ValueError(
            f"{where!r} must hold the tensor {names.in_file(missing[0])!r}, got none of that name"
            + _and_others(missing)
        )
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise ValueError(
            f"{where!r} must hold no tensor but those of its configuration, got "
            f"{tensors[extra[0]].name!r}" + _and_others(extra)
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.name!r} must have the shape {list(shape)} that the configuration says, "
                f"got {list(tensor.shape)} in {str(tensor.file)!r}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{tensor.name!r} must have one of the dtypes {', '.join(DTYPES.values())}, got "
                f"{tensor.dtype} in {str(tensor.file)!r}"
            )


def _and_others(found: list[str]) -> str:
    return f" ({len(found) - 1} more like it)" * (len(found) > 1)


@contextmanager
def reader(
    place: names.Place, tensors: Mapping[str, Tensor], dtype: np.dtype
) -> Iterator[Callable[[tuple[slice, ...]], np.ndarray]]:
    """A function that reads a part of a parameter, of all layers of its stack.

    Args:
      place: where the parameter is.
      tensors: the tensors of the folder.
      dtype: dtype of the result.
    """
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        for name in place.tensors:
            file = tensors[name].file
            if file not in handles:
                handles[file] = stack.enter_context(_opened(file))

        def tensor(name: str) -> Any:
            return handles[tensors[name].file].get_slice(tensors[name].name)

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if not place.stacked:
                part = place.read(tensor(place.tensors[0]), index)
                return np.ascontiguousarray(part, dtype)
            layers = place.tensors[index[0]]
            shape = [
                len(range(*part.indices(size)))
                for part, size in zip(index[1:], place.shape, strict=True)
            ]
            out = np.empty((len(layers), *shape), dtype)
            for layer, name in enumerate(layers):
                out[layer] = place.read(tensor(name), index[1:])
            return out

        yield read


def same_contents(first: Tensor, second: Tensor, rows: int = 4096) -> bool:
    """Whether two tensors [rows, columns] have the same bits, read a few rows at a time."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    with _opened(first.file) as one, _opened(second.file) as other:
        a, b = one.get_slice(first.name), other.get_slice(second.name)
        starts = range(0, first.shape[0], rows)
        parts = [slice(start, min(start + rows, first.shape[0])) for start in starts]
        return all(a[part].tobytes() == b[part].tobytes() for part in parts)


def dtype_of(place: names.Place, tensors: Mapping[str, Tensor]) -> str:
    """The dtype that all tensors of a parameter have.

    Raises:
      ValueError: the layers of a stack have several.
    """
    first = tensors[place.tensors[0]]
    for name in place.tensors[1:]:
        if tensors[name].dtype != first.dtype:
            raise ValueError(
                f"{tensors[name].name!r} must have the dtype of {first.name!r}, {first.dtype}, or "
                f"param_dtype must be given, got {tensors[name].dtype}"
            )
    return DTYPES[first.dtype]


def dtype_of_most(tensors: Iterable[tuple[tuple[int, ...], str | None]]) -> str:
    """The dtype that most weights have, of tensors of these shapes and dtypes."""
    counts: Counter[str] = Counter()
    for shape, dtype in tensors:
        if dtype is not None:
            counts[dtype] += math.prod(shape)
    return max(counts, key=counts.__getitem__, default="float32")
