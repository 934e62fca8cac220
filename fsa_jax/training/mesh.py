"""Where a run computes: the mesh of its devices, and how its arrays are split over them.

The axes are `data` (rows of a batch; with fsdp also parameters), `tensor` (heads, and the hidden
features of the feed-forward) and `sequence` (tokens of a row, see `fsa_jax.sequence_parallel`).
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fsa_jax.partitioning import sharding_rules
from fsa_jax.training.config import AXES, parse_mesh
from fsa_jax.transformer import Transformer, TransformerConfig

#: A process that is gone is noticed after this long at the latest.
_HEARTBEAT_SECONDS = 30
_SHUTDOWN_SECONDS = 30


class ProcessLost(RuntimeError):
    """Another process of a run has ended, or cannot be reached any more."""


@contextlib.contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Turns what jax raises where another process is gone into `ProcessLost`."""
    try:
        yield
    except RuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ProcessLost(
            f"another process of the run ended, or computing together failed ({reason}): start all "
            "processes again with --resume to go on from the last checkpoint"
        ) from error


def join_processes() -> None:
    """Makes this process one of several of a run; does nothing if it is already.

    Slurm, Kubernetes and Open MPI are recognised by jax. Elsewhere the environment says where
    process 0 listens, how many processes there are and which this one is:
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if jax.distributed.is_initialized():
        return
    count, number = (os.environ.get(f"JAX_{x}") for x in ("NUM_PROCESSES", "PROCESS_ID"))
    jax.distributed.initialize(
        num_processes=None if count is None else int(count),
        process_id=None if number is None else int(number),
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )


def is_leader() -> bool:
    """Whether this is the process that writes what all processes know."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until every process has come here."""
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agreed(value: bool) -> bool:
    """The value that the leader has, on every process."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def all_agree(value: bool) -> bool:
    """Whether the value is true on every process."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))


def on_leader(action: Callable[[], object]) -> None:
    """Has the leader do something; where it raises ValueError or OSError, every process does."""
    error = None
    if is_leader():
        try:
            action()
        except (ValueError, OSError) as raised:
            error = raised
    if not agreed(error is None):
        raise error or ValueError("process 0 of the run has refused to go on, and has said why")


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and how a run's arrays are split over it.

    Attributes:
      mesh: axes data, tensor and sequence, of type Auto.
      fsdp: whether parameters and optimiser state are split over `data` too.
    """

    mesh: Mesh
    fsdp: bool = False

    @staticmethod
    def build(text: str, *, fsdp: bool = False) -> "Placement":
        """The placement on this machine's (or all processes') devices.

        Raises:
          ValueError: there are not as many devices.
        """
        sizes = parse_mesh(text)
        wanted, devices = math.prod(sizes.values()), jax.devices()
        if wanted > len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
            raise ValueError(
                f"mesh must be of the {len(devices)} devices that there are, got {text!r} of "
                f"{wanted}"
            )
        types = (AxisType.Auto,) * len(AXES)
        shape = tuple(sizes[name] for name in AXES)
        mesh = jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:wanted])
        return Placement(mesh, fsdp)

    @property
    def stripes(self) -> int:
        """Devices that share a row."""
        return self.mesh.shape["sequence"]

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """Of a batch [B, T] as it comes in."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def tokens(self) -> NamedSharding:
        """Of arrays [B, T] in stripe order."""
        return NamedSharding(self.mesh, PartitionSpec("data", "sequence"))

    def model(self, config: TransformerConfig) -> TransformerConfig:
        """The configuration of the model as it runs here."""
        return dataclasses.replace(config, sequence_axis="sequence" if self.stripes > 1 else None)

    def params(self, config: TransformerConfig) -> Any:
        """Shardings of the parameters."""
        state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
        rules = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
        with sharding_rules(**rules, embed="data" if self.fsdp else None):
            specs = nnx.to_pure_dict(nnx.get_partition_spec(state))

        def place(path, spec):
            # A table that is split over its features would make XLA split all activations so, and
            # compute every row everywhere. The others of these are vectors.
            whole = {str(key.key) for key in path} & {"embedding", "head", "scale", "bias"}
            return NamedSharding(self.mesh, PartitionSpec() if whole else spec)

        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        return jax.tree_util.tree_map_with_path(place, specs, is_leaf=is_spec)

    def opt_state(self, optimizer: optax.GradientTransformation, params: Any, template: Any) -> Any:
        """Shardings of the optimiser's state, moments like their parameters."""
        opt_state = jax.eval_shape(optimizer.init, template)
        return optax.tree_utils.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            opt_state,
            params,
            transform_non_params=lambda _: self.replicated,
        )

    def own_rows(self, batch_size: int) -> tuple[int, int]:
        """First and one past the last row of a batch that this process's devices hold."""
        indices = self.rows.addressable_devices_indices_map((batch_size,))
        rows = [index[0].indices(batch_size)[:2] for index in indices.values() if index]
        return min(first for first, _ in rows), max(last for _, last in rows)

    def place(self, x: np.ndarray, first_row: int = 0, rows: int | None = None) -> jax.Array:
        """The global array [rows, T] of which `x` are the rows from `first_row` on."""
        shape = (x.shape[0] if rows is None else rows, *x.shape[1:])

        def part(index):
            first, last, _ = index[0].indices(shape[0])
            return x[first - first_row : last - first_row]

        return jax.make_array_from_callback(shape, self.rows, part)


def check_placement(placement: Placement, model: TransformerConfig, *, batch_size, row_length):
    """Raises ValueError, naming the rule, unless a run divides over the mesh."""
    sizes = placement.mesh.shape
    if batch_size % sizes["data"]:
        raise ValueError(
            f"batch_size must be a multiple of the devices of mesh axis data={sizes['data']}, got "
            f"{batch_size}"
        )
    for name in ("num_kv_heads", "mlp_dim"):
        if getattr(model, name) % sizes["tensor"]:
            raise ValueError(
                f"{name} must be a multiple of the devices of mesh axis "
                f"tensor={sizes['tensor']}, got {getattr(model, name)}"
            )
    if placement.fsdp and model.embed_dim % sizes["data"]:
        raise ValueError(
            f"embed_dim must be a multiple of the devices of mesh axis data={sizes['data']} with "
            f"fsdp, got {model.embed_dim}"
        )
    if sizes["sequence"] == 1:
        return
    stripes = 2 * sizes["sequence"]
    if model.attention == "full":
        if row_length % stripes:
            raise ValueError(
                f"row_length must be a multiple of 2 * sequence = {stripes}, got {row_length}"
            )
        return
    stride = stripes * model.nsa.kernel_stride
    if row_length % stride or row_length < stripes * model.nsa.kernel_size:
        raise ValueError(
            f"row_length must be a multiple of 2 * sequence * kernel_stride = {stride}, and at "
            f"least 2 * sequence * kernel_size, got {row_length}"
        )
