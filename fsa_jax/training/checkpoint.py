"""Checkpoints of a run: its training state, its position in the data, and its configuration."""

import dataclasses
import errno
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from flax import nnx

from fsa_jax.messages import say
from fsa_jax.training.config import TrainConfig, config_from_json, config_to_json
from fsa_jax.training.folder import CHECKPOINTS, DAMAGED_CHECKPOINT, has_checkpoint, kept_aside
from fsa_jax.training.mesh import all_agree, is_leader, on_leader
from fsa_jax.training.step import TrainState, abstract_model
from fsa_jax.transformer import Transformer

_KEEP = 2


class RunPosition(NamedTuple):
    """What a checkpoint holds besides arrays.

    Attributes:
      config: configuration of the run that wrote the checkpoint.
      fingerprint: fingerprint of the run's corpus.
      batches: position in the training batches, as `TrainingBatches.get_state` returns it.
    """

    config: TrainConfig
    fingerprint: str
    batches: dict[str, Any]


class UnreadableCheckpoint(ValueError):
    """A checkpoint is damaged, or has a format that this version does not read."""


class Checkpoints:
    """The checkpoints of a run; use it as a context manager.

    Args:
      run_folder: the folder of the run, whose subfolder "checkpoints" is used.
      create: whether to create the subfolder if it does not exist.
    """

    def __init__(self, run_folder: Path, *, create: bool = False):
        # orbax accepts only absolute paths.
        self.folder = (run_folder / CHECKPOINTS).absolute()
        # Saving is synchronous: the next step, to which the state's buffers are donated, must not
        # overwrite them while a background thread still writes them to disk.
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=_KEEP,
                create=create,
                enable_async_checkpointing=False,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def newest[Found](
        self, read: Callable[[int], Found], *, quiet: bool = False
    ) -> tuple[int, Found]:
        """The step of the newest checkpoint that can be read, and what `read` returns for it.

        Args:
          read: reads the checkpoint of a step, or raises UnreadableCheckpoint.
          quiet: whether to print no messages about newer checkpoints, which are damaged.

        Raises:
          UnreadableCheckpoint: no checkpoint can be read; the error is that of the newest one.
        """
        damaged: list[UnreadableCheckpoint] = []
        for step in self._steps():
            try:
                found, error = [read(step)], None
            except UnreadableCheckpoint as unreadable:
                found, error = [], unreadable
            if all_agree(bool(found)):
                for reason in damaged if is_leader() and not quiet else ():
                    say(f"{reason}; the checkpoint of step {step} is taken instead")
                return step, found[0]
            where = str(self.folder / str(step))
            other = UnreadableCheckpoint(
                f"checkpoint must be readable by every process, got {where}"
            )
            damaged.append(error or other)
        if damaged:
            raise damaged[0]
        raise UnreadableCheckpoint(f"checkpoint must be complete, got none in {str(self.folder)!r}")

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps(), reverse=True)

    def set_aside_after(self, step: int) -> None:
        """Moves newer checkpoints, which are damaged, out of the way of later ones."""
        for newer in (x for x in self._steps() if x > step):
            old = self.folder / str(newer)
            new = kept_aside(self.folder.parent, f"{DAMAGED_CHECKPOINT}{newer}-")
            on_leader(functools.partial(old.rename, new))
        self._manager.reload()

    def save(self, step: int, state: TrainState, position: RunPosition) -> None:
        """Writes a checkpoint and deletes old ones; does nothing if that of `step` exists.

        Raises:
          OSError: the checkpoint cannot be written.
        """
        if step in self._manager.all_steps():
            return
        try:
            saved = self._save(step, state, position)
        # On a full disk orbax, zarr and tensorstore raise almost any type of exception.
        except Exception as error:
            if jax.process_count() > 1 and isinstance(error, RuntimeError):
                raise  # another process may be lost
            raise OSError(errno.EIO, _first_line(error), str(self.folder / str(step))) from error
        if not saved:
            raise OSError(errno.EIO, "orbax has refused to save", str(self.folder / str(step)))

    def _save(self, step: int, state: TrainState, position: RunPosition) -> bool:
        # The parameters are an item of their own, so that sampling reads nothing else.
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                rest=ocp.args.StandardSave(state._replace(params=())._asdict()),
                position=ocp.args.JsonSave(
                    {
                        "config": config_to_json(position.config),
                        "fingerprint": position.fingerprint,
                        "batches": position.batches,
                    }
                ),
            ),
        )

    def read_position(self, step: int) -> RunPosition:
        """Reads what the checkpoint holds besides arrays."""
        values = self._restore(step, position=ocp.args.JsonRestore())["position"]
        try:
            return RunPosition(
                config=config_from_json(values["config"]),
                fingerprint=values["fingerprint"],
                batches=values["batches"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._unreadable(step, error) from error

    def read_params(self, step: int, template: Any) -> Any:
        """Reads the parameters; `template` gives their shapes, dtypes and shardings."""
        restore = ocp.args.StandardRestore(_placed(template))
        return self._restore(step, params=restore)["params"]

    def read_state(self, step: int, template: TrainState) -> TrainState:
        """Reads the whole state; `template` gives its shapes, dtypes and shardings."""
        params = self.read_params(step, template.params)
        rest = _placed(template._replace(params=())._asdict())
        values = self._restore(step, rest=ocp.args.StandardRestore(rest))["rest"]
        return TrainState(**values | {"params": params})

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        # On damaged files json, zarr, tensorstore and orbax raise almost any type of exception.
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> UnreadableCheckpoint:
        return UnreadableCheckpoint(
            f"checkpoint must be readable by this version and complete, got "
            f"{str(self.folder / str(step))!r}: {type(error).__name__}: {_first_line(error)}"
        )


def load_model(run_folder: Path, **changes: Any) -> tuple[Transformer, TrainConfig]:
    """Loads the model and the configuration of a run from its last checkpoint.

    Args:
      run_folder: the folder that `train` wrote to.
      **changes: fields of the model's configuration to change, except those that determine the
        parameters.

    Returns:
      The model with the trained parameters, and the configuration of the run.

    Raises:
      ValueError: there is no checkpoint, or none that can be read.
    """
    if not has_checkpoint(run_folder):
        raise ValueError(
            "checkpoint must be the folder of a run with a checkpoint in it, got "
            f"{str(run_folder)!r}"
        )
    with Checkpoints(run_folder) as checkpoints:

        def read(step):
            config = checkpoints.read_position(step).config
            graphdef, template = abstract_model(dataclasses.replace(config.model, **changes))
            return nnx.merge(graphdef, checkpoints.read_params(step, template)), config

        step, (model, config) = checkpoints.newest(read)
    say_if_warming(run_folder, step, config)
    return model, config


def say_if_warming(run_folder: Path, step: int, config: TrainConfig) -> None:
    """Says so if a model that is loaded is still in its attention warm-up."""
    if config.warms_attention(step):
        say(
            f"{run_folder} is at step {step} of attention_warmup={config.attention_warmup!r}: its "
            "weights are trained with full attention only, and its sparse attention, which is "
            "what is loaded, is not trained yet"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _placed(template: Any) -> Any:
    """The template with a sharding for each array: its own, or this process's first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf):
        sharding = getattr(leaf, "sharding", None) or first
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, template)
