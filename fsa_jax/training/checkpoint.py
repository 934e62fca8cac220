"""Checkpoints of a run: parameters, optimiser, step, rng, data position and configuration."""

import errno
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from fsa_jax.messages import say
from fsa_jax.training.config import TrainConfig, config_from_json, config_to_json
from fsa_jax.training.folder import CHECKPOINTS, DAMAGED_CHECKPOINT, kept_aside
from fsa_jax.training.mesh import all_agree, is_leader, on_leader
from fsa_jax.training.step import TrainState

_KEEP = 2


class RunPosition(NamedTuple):
    """What a checkpoint holds beside arrays.

    Attributes:
      config: configuration of the run that wrote it.
      fingerprint: fingerprint of its corpus.
      batches: position of the training batches.
    """

    config: TrainConfig
    fingerprint: str
    batches: dict[str, Any]


class UnreadableCheckpoint(ValueError):
    """A checkpoint is damaged, or was not written by this version."""


class Checkpoints:
    """The checkpoints in a run's folder; use as a context manager.

    Args:
      run_folder: the folder of the run; its folder "checkpoints" is used.
      create: make that folder if it is not there.
    """

    def __init__(self, run_folder: Path, *, create: bool = False):
        # orbax takes absolute paths only.
        self.folder = (run_folder / CHECKPOINTS).absolute()
        # A donated buffer must not be overwritten while a background thread still writes it, so
        # saving is synchronous.
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
        """Step of the newest checkpoint that can be read, and what `read` gives for it.

        Says which newer ones are damaged, unless it is to be quiet.

        Raises:
          UnreadableCheckpoint: there is none; the error is that of the newest one.
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
            other = UnreadableCheckpoint(f"checkpoint must be whole for every process, got {where}")
            damaged.append(error or other)
        if damaged:
            raise damaged[0]
        raise UnreadableCheckpoint(f"checkpoint must be complete, got none in {str(self.folder)!r}")

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps(), reverse=True)

    def set_aside_after(self, step: int) -> None:
        """Moves newer checkpoints, which are damaged, out of the way of those that are to come."""
        for newer in (x for x in self._steps() if x > step):
            old = self.folder / str(newer)
            new = kept_aside(self.folder.parent, f"{DAMAGED_CHECKPOINT}{newer}-")
            on_leader(functools.partial(old.rename, new))
        self._manager.reload()

    def save(self, step: int, state: TrainState, position: RunPosition) -> None:
        """Writes a checkpoint and drops old ones; does nothing if `step` is there already.

        Raises:
          OSError: the checkpoint cannot be written.
        """
        if step in self._manager.all_steps():
            return
        try:
            saved = self._save(step, state, position)
        # A full disk raises almost anything, from orbax, zarr or tensorstore.
        except Exception as error:
            if jax.process_count() > 1 and isinstance(error, RuntimeError):
                raise  # another process may be gone
            raise OSError(errno.EIO, _first_line(error), str(self.folder / str(step))) from error
        if not saved:
            raise OSError(errno.EIO, "orbax has refused to save", str(self.folder / str(step)))

    def _save(self, step: int, state: TrainState, position: RunPosition) -> bool:
        # Parameters stand apart, so that sampling needs to read nothing else.
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
        """Reads what stands beside the arrays."""
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
        """Reads the parameters; `template` gives shapes, dtypes and places."""
        restore = ocp.args.StandardRestore(_placed(template))
        return self._restore(step, params=restore)["params"]

    def read_state(self, step: int, template: TrainState) -> TrainState:
        """Reads the whole state; `template` likewise."""
        params = self.read_params(step, template.params)
        rest = _placed(template._replace(params=())._asdict())
        values = self._restore(step, rest=ocp.args.StandardRestore(rest))["rest"]
        return TrainState(**values | {"params": params})

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        # Damaged files raise almost anything, from json, zarr, tensorstore or orbax.
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> UnreadableCheckpoint:
        return UnreadableCheckpoint(
            f"checkpoint must be one that this version wrote, complete, got "
            f"{str(self.folder / str(step))!r}: {type(error).__name__}: {_first_line(error)}"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _placed(template: Any) -> Any:
    """The template with a place for each array: its own, or this process's first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf):
        sharding = getattr(leaf, "sharding", None) or first
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, template)
