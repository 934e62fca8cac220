"""Checkpoints of a run: parameters, optimiser, step, rng, data position and configuration."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from fsa_jax.training.config import TrainConfig, config_from_json, config_to_json
from fsa_jax.training.step import TrainState

_FOLDER = "checkpoints"
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


def has_checkpoint(run_folder: Path) -> bool:
    """Whether the folder of a run holds a complete checkpoint."""
    folder = run_folder / _FOLDER
    # orbax writes to another name and renames when all is there.
    return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())


def remove_checkpoints(run_folder: Path) -> None:
    """Deletes the checkpoints of a run, and nothing else."""
    shutil.rmtree(run_folder / _FOLDER, ignore_errors=True)


class Checkpoints:
    """The checkpoints in a run's folder; use as a context manager.

    Args:
      run_folder: the folder of the run; its folder "checkpoints" is used.
      create: make that folder if it is not there.
    """

    def __init__(self, run_folder: Path, *, create: bool = False):
        # orbax takes absolute paths only.
        self.folder = (run_folder / _FOLDER).absolute()
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

    def last_step(self) -> int:
        """Step of the newest checkpoint; ValueError when there is none."""
        step = self._manager.latest_step()
        if step is None:
            raise ValueError(f"checkpoint must be complete, got none in {str(self.folder)!r}")
        return step

    def save(self, step: int, state: TrainState, position: RunPosition) -> None:
        """Writes a checkpoint and drops old ones; does nothing if `step` is there already."""
        if step in self._manager.all_steps():
            return
        # Parameters stand apart, so that sampling needs to read nothing else.
        self._manager.save(
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

    def _unreadable(self, step: int, error: Exception) -> ValueError:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        return ValueError(
            f"checkpoint must be one that this version wrote, complete, got "
            f"{str(self.folder / str(step))!r}: {type(error).__name__}: {reason}"
        )


def _placed(template: Any) -> Any:
    """The template with a place for each array: its own, or this process's first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf):
        sharding = getattr(leaf, "sharding", None) or first
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, template)
