"""Measured tiles: the tiles that `fsa-jax tune` found to be the fastest on a device.

A table is a JSON file for one device. The package ships some tables (`devices/*.json`), and the
environment variable FSA_JAX_TUNING may name a table of the user, which takes precedence over the
shipped one for the same device. Without a table, or without an entry that fits a call, the
heuristics of the plans apply. A table selects tiles and nothing else, so it never changes the
meaning of results.

An entry applies to calls with the same kernel, branch, bits per number, padded head widths and
block size. Of the entries that apply, the one with the nearest group by ratio is taken, at most a
factor of 2 away, and the smaller group of two equally near ones. If the heuristic tile was the
fastest for that entry (`chosen` is 0), the heuristics apply: unlike the entry's tile, they account
for the registers that the call's own group needs.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib.resources
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from fsa_jax.pallas.block_attention.plan import Plan, SelectedTuning
from fsa_jax.pallas.tile_config import Tile, padded_width

WHAT = "fsa-jax tune"
VARIABLE = "FSA_JAX_TUNING"
#: Kernels of selected attention for which a table may hold tiles: method, pass, and field of the
#: plan.
SELECTED = {
    "kv_outer_forward": ("kv_outer", "forward", "forward"),
    "kv_outer_backward": ("kv_outer", "backward", "backward"),
    "query_tile_forward": ("query_tile", "forward", "query_tile"),
    "query_tile_backward": ("query_tile", "backward", "query_tile_backward"),
    "key_gradient": ("query_tile", "backward", "key_gradient"),
}
KERNELS = (
    *SELECTED,
    "range_forward",
    "range_query_gradient",
    "range_key_gradient",
    "score",
)
BRANCHES = ("compressed", "window")
_SIZES = ("rows", "num_warps", "num_stages")
#: Largest ratio between the group of a call and the group of the entry that applies to it.
_NEAR = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A table of tiles. Tables compare by identity, so a trace with one is not reused for another.

    Attributes:
      device: the kind of device that it was measured on; "" for a table made by `using`.
      tiles: the entries, in the format of `entry`.
    """

    device: str
    tiles: tuple[dict[str, Any], ...]


_IN_USE: contextvars.ContextVar[Table | None] = contextvars.ContextVar("tiles", default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """The properties of a call that identify an entry.

    Attributes:
      kernel: one of `KERNELS`.
      branch: one of `BRANCHES` for the range kernels, else None.
      bits: bits per number, 16 or 32.
      width, value_width: padded head widths D and E.
      group: query heads per key head.
      block_size: block size of selected attention, else None.
    """

    kernel: str
    branch: str | None
    bits: int
    width: int
    value_width: int
    group: int
    block_size: int | None


def branch_of(query, key) -> str:
    """The branch of a call on ranges: there are at most half as many compressed keys as queries."""
    return BRANCHES[2 * key.shape[1] > query.shape[1]]


def key_of(kernel: str, query, key, value, block_size: int | None = None) -> Key:
    """The key of a call; arrays as the plans take them."""
    branch = branch_of(query, key) if kernel.startswith("range") else None
    return Key(
        kernel=kernel,
        branch=branch,
        bits=8 * query.dtype.itemsize,
        width=padded_width(key.shape[3]),
        value_width=padded_width(value.shape[3]),
        group=query.shape[2] // key.shape[2],
        block_size=block_size,
    )


def table() -> Table | None:
    """The table for the device to compile for; None if there is none.

    The device is taken from the current abstract mesh (ahead-of-time compilation), or else it is
    the default device.

    Raises:
      ValueError: the user's file is invalid.
    """
    if (found := _IN_USE.get()) is not None:
        return found
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else _default_device_kind()
    user = os.environ.get(VARIABLE)
    if user and (found := _load(user)).device == kind:
        return found
    return _shipped().get(kind)


def _default_device_kind() -> str:
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return device.device_kind if isinstance(device, jax.Device) else jax.devices()[0].device_kind


@contextlib.contextmanager
def using(tiles: Mapping[Key, Tile]) -> Iterator[None]:
    """Context in which this thread traces with these tiles, and with heuristics for the rest."""
    made = Table("", tuple(entry(key, tile) for key, tile in tiles.items()))
    token = _IN_USE.set(made)
    try:
        yield
    finally:
        _IN_USE.reset(token)


def entry(key: Key, tile: Tile) -> dict[str, Any]:
    """The entry of a table for a key and its tile."""
    return dataclasses.asdict(key) | dataclasses.asdict(tile)


def choose[Some: Tile](
    kernel: str,
    table: Table | None,
    heuristic: Some,
    query,
    key,
    value,
    block_size: int | None = None,
) -> Some:
    """The tile of a kernel for a call: the measured tile of the table, else the heuristic one.

    Args:
      kernel: one of `KERNELS`.
      table: result of the function `table`, or None.
      heuristic: the tile that the plan would use without a table.
      query: [B, T, N, D].
      key: [B, M, K, D].
      value: [B, M, K, E].
      block_size: block size of selected attention.
    """
    if table is None:
        return heuristic
    wanted = key_of(kernel, query, key, value, block_size)
    same = dataclasses.asdict(wanted)
    del same["group"]

    def distance(found):
        return abs(math.log2(found["group"] / wanted.group))

    serve = [
        found
        for found in table.tiles
        if all(found[field] == size for field, size in same.items())
        and distance(found) <= math.log2(_NEAR)
        and found["rows"] >= wanted.group
    ]
    if not serve:
        return heuristic
    best = min(serve, key=lambda found: (distance(found), found["group"]))
    if best.get("chosen") == 0:
        return heuristic
    sizes = {field.name: best[field.name] for field in dataclasses.fields(heuristic)}
    return dataclasses.replace(heuristic, **sizes)


def fill(
    plan: Plan, tuning: SelectedTuning, table: Table | None, query, key, value, block_size: int
) -> Plan:
    """A plan of selected attention with measured tiles for those that `tuning` leaves open."""
    if table is None or tuning.block_k is not None:
        return plan
    tiles = {
        field: choose(kernel, table, getattr(plan, field), query, key, value, block_size)
        for kernel, (_, name_of_pass, field) in SELECTED.items()
        if getattr(tuning, name_of_pass) is None
    }
    return dataclasses.replace(plan, **tiles)


def entries(table: Table | None) -> tuple[dict, ...]:
    """The entries of a table; empty for None."""
    return () if table is None else table.tiles


@functools.cache
def _shipped() -> dict[str, Table]:
    """The tables that the package ships, by device."""
    folder = importlib.resources.files("fsa_jax.pallas") / "devices"
    paths = [path for path in folder.iterdir() if path.name.endswith(".json")]
    tables = [_table_of(path.read_text(encoding="utf-8"), path.name) for path in paths]
    return {table.device: table for table in tables}


def _load(path: str) -> Table:
    """Loads the user's table."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{VARIABLE} must name a file that can be read, got {path!r}") from error
    return _table_of(text, path)


@functools.cache
def _table_of(text: str, where: str) -> Table:
    """The table with the content `text`: the same object as long as a file does not change."""
    content = read(text, where)
    return Table(content["device"], tuple(content["tiles"]))


def read(text: str, where: str) -> dict[str, Any]:
    """Parses and checks the content of a table.

    Raises:
      ValueError: it is no table, no measurement, or an entry does not have the format of `entry`.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("what") != WHAT:
        raise ValueError(f"{where} is not a table of `{WHAT}`: 'what' must be {WHAT!r}")
    if content.get("measurement") is not True:
        raise ValueError(f"{where} measures nothing: it was not made on a GPU")
    if not isinstance(content.get("device"), str) or not isinstance(content.get("tiles"), list):
        raise ValueError(f"{where} must have a 'device' and a list of 'tiles'")
    for number, found in enumerate(content["tiles"]):
        _check_entry(f"{where}, tile {number}", found)
    return content


def _check_entry(where: str, found: object) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be an object, got {found!r}")
    ranged = str(found.get("kernel")).startswith("range")
    names = [field.name for field in dataclasses.fields(Key)]
    for name in (*names, *_SIZES, *(["keys"] if ranged else [])):
        if name not in found:
            raise ValueError(f"{where}: key {name!r} is missing")
    if found["kernel"] not in KERNELS:
        raise ValueError(f"{where}: kernel must be one of {KERNELS}, got {found['kernel']!r}")
    if found["branch"] not in (BRANCHES if ranged else (None,)):
        raise ValueError(f"{where}: bad value of key 'branch': {found['branch']!r}")
    for name in ("bits", "width", "value_width", "group", *(["keys"] if ranged else [])):
        if type(found[name]) is not int or found[name] < 1:
            raise ValueError(f"{where}: bad value of key {name!r}: {found[name]!r}")
    try:
        Tile(**{name: found[name] for name in _SIZES})
        if ranged:
            Tile(rows=found["keys"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if found["rows"] < found["group"]:
        raise ValueError(f"{where}: rows={found['rows']} must hold the {found['group']} heads")
