"""The device mesh of a run, its processes, and how its arrays are split over the mesh.

The axes are `data`, which splits the sequences of a batch, and with fsdp also parameters; `tensor`,
which splits heads and the hidden features of the feed-forward; and `sequence`, which splits the
tokens of each sequence, see `fsa_jax.sequence_parallel`.
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

from fsa_jax.partitioning import training_shardings
from fsa_jax.training.config import AXES, parse_mesh
from fsa_jax.transformer import Transformer, TransformerConfig

#: A lost process is noticed after this time at the latest.
_HEARTBEAT_SECONDS = 30
_SHUTDOWN_SECONDS = 30


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or can no longer be reached."""


@contextlib.contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Turns the errors that jax raises after the loss of another process into `ProcessLost`."""
    try:
        yield
    except RuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ProcessLost(
            f"another process of the run ended, or a collective computation failed ({reason}): "
            "start all processes again with --resume to continue from the last checkpoint"
        ) from error


def join_processes() -> None:
    """Joins this process to the others of a run; does nothing if it has joined already.

    jax recognises Slurm, Kubernetes and Open MPI. Elsewhere environment variables give the address
    of process 0, the number of processes and the number of this one: JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.
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
    """Whether this is the process that writes the files and messages of the run."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until every process has reached this point."""
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agreed(value: bool) -> bool:
    """The leader's value, on every process."""
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
    """Runs the action on the leader; if it raises ValueError or OSError, every process raises."""
    error = None
    if is_leader():
        try:
            action()
        except (ValueError, OSError) as raised:
            error = raised
    if not agreed(error is None):
        raise error or ValueError(
            "process 0 of the run has stopped with an error, which it has printed"
        )


@dataclasses.dataclass(frozen=True)
class Placement:
    """A device mesh, and the shardings of a run's arrays on it.

    Attributes:
      mesh: the mesh, with the axes data, tensor and sequence, of type Auto.
      fsdp: whether parameters and optimiser state are split over `data` too.
    """

    mesh: Mesh
    fsdp: bool = False

    @staticmethod
    def build(text: str, *, fsdp: bool = False) -> "Placement":
        """The placement on the devices of this machine, or of all processes.

        Args:
          text: the mesh, as `parse_mesh` takes it.
          fsdp: as of the class.

        Raises:
          ValueError: the machine has fewer devices than the mesh, or several processes have more.
        """
        sizes = parse_mesh(text)
        wanted, devices = math.prod(sizes.values()), jax.devices()
        if wanted > len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
            raise ValueError(
                f"mesh must fit the {len(devices)} devices available, got {text!r}, which needs "
                f"{wanted}"
            )
        types = (AxisType.Auto,) * len(AXES)
        shape = tuple(sizes[name] for name in AXES)
        mesh = jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:wanted])
        return Placement(mesh, fsdp)

    @property
    def sequence_devices(self) -> int:
        """The number of devices that the tokens of a sequence are split over."""
        return self.mesh.shape["sequence"]

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that every device holds as a whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """The sharding of the tokens and segment ids [B, T] that a step is given."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def tokens(self) -> NamedSharding:
        """The sharding of arrays [B, T] in the token order of sequence parallelism."""
        return NamedSharding(self.mesh, PartitionSpec("data", "sequence"))

    def loss_tokens(self, shape: tuple[int, int]) -> PartitionSpec:
        """How the loss splits the tokens [B, T] of the model, in its token order.

        The devices of axis `tensor` hold the same hidden states and the whole head, so each takes a
        part of the tokens, if their number divides.
        """
        axes = ("sequence", "tensor")
        if shape[1] % (self.mesh.shape["sequence"] * self.mesh.shape["tensor"]):
            axes = ("sequence",)
        return PartitionSpec("data", axes)

    def model(self, config: TransformerConfig) -> TransformerConfig:
        """The configuration of the model as it runs on this mesh."""
        axis = "sequence" if self.sequence_devices > 1 else None
        return dataclasses.replace(config, sequence_axis=axis)

    def params(self, config: TransformerConfig) -> Any:
        """The shardings of the parameters."""
        state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
        return training_shardings(state, self.mesh, fsdp=self.fsdp)

    def opt_state(self, optimizer: optax.GradientTransformation, params: Any, template: Any) -> Any:
        """The shardings of the optimiser state: moments are split like their parameters."""
        opt_state = jax.eval_shape(optimizer.init, template)
        return optax.tree_utils.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            opt_state,
            params,
            transform_non_params=lambda _: self.replicated,
        )

    def own_sequences(self, batch_size: int) -> tuple[int, int]:
        """First and one past the last sequence of a batch that this process's devices hold."""
        indices = self.batch.addressable_devices_indices_map((batch_size,))
        ranges = [index[0].indices(batch_size)[:2] for index in indices.values() if index]
        return min(first for first, _ in ranges), max(last for _, last in ranges)

    def place(self, x: np.ndarray, first: int = 0, batch_size: int | None = None) -> jax.Array:
        """The global array [batch_size, T] of a batch, split as `batch`.

        Args:
          x: the sequences of the batch that this process holds, [b, T].
          first: index in the batch of the first of them.
          batch_size: sequences of the batch; None: `x` has all of them.
        """
        shape = (x.shape[0] if batch_size is None else batch_size, *x.shape[1:])

        def part(index):
            start, stop, _ = index[0].indices(shape[0])
            return x[start - first : stop - first]

        return jax.make_array_from_callback(shape, self.batch, part)


def check_placement(
    placement: Placement, model: TransformerConfig, *, batch_size, seq_len, accumulate=1
):
    """Raises ValueError, naming the rule, unless the sizes of a run divide over the mesh."""
    sizes = placement.mesh.shape
    if model.sequence_axis is not None:
        raise ValueError(
            "sequence_axis must be None in a run, whose mesh says whether tokens are split, got "
            f"{model.sequence_axis!r}: set mesh to sequence=2, for example"
        )
    if batch_size // accumulate % sizes["data"] and accumulate > 1:
        raise ValueError(
            f"batch_size must be a multiple of accumulate={accumulate} times the devices of mesh "
            f"axis data={sizes['data']}, got {batch_size}"
        )
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
    flat = model.nsa.kernel_size * model.head_dim
    has_matrices = "nsa" in model.types and model.compression in ("linear", "mlp")
    if placement.fsdp and has_matrices and flat % sizes["data"]:
        raise ValueError(
            "kernel_size * head_dim must be a multiple of the devices of mesh axis "
            f"data={sizes['data']} with fsdp, got {model.nsa.kernel_size} * {model.head_dim}"
        )
    if sizes["sequence"] == 1:
        return
    # Each device holds two parts of a sequence, an early and a late one.
    parts = 2 * sizes["sequence"]
    if "nsa" not in model.types:
        if seq_len % parts:
            raise ValueError(f"seq_len must be a multiple of 2 * sequence = {parts}, got {seq_len}")
        return
    stride = parts * model.nsa.kernel_stride
    if seq_len % stride or seq_len < parts * model.nsa.kernel_size:
        raise ValueError(
            f"seq_len must be a multiple of 2 * sequence * kernel_stride = {stride}, and at "
            f"least 2 * sequence * kernel_size, got {seq_len}"
        )
