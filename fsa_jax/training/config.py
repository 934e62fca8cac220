"""What a training run is: one dataclass, and the presets that are values of it."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fsa_jax.arguments import scalars
from fsa_jax.config import NSAConfig
from fsa_jax.transformer import TransformerConfig

# Tokens: the ids 0..255 are bytes; one more id starts every document.
DOCUMENT_START = 256
VOCAB_SIZE = 257

# These say where, how long and how often. They change no number of a training step, so a resumed
# run may change them; all other fields must stay. `data` is compared by content instead.
FREE_ON_RESUME = frozenset(
    {"data", "out", "preset", "steps", "resume", "overwrite", "eval_every", "checkpoint_every"}
    | {"mesh", "fsdp", "distributed"}
)


#: Axes of a mesh of devices, see `fsa_jax.training.mesh`.
AXES = ("data", "tensor", "sequence")


def parse_mesh(text: str) -> dict[str, int]:
    """Devices of each axis, from text like "data=2,tensor=4"; an axis that is left out has one.

    Raises:
      ValueError: the text is not of that form.

    Example:
      >>> parse_mesh("data=2,tensor=4")
      {'data': 2, 'tensor': 4, 'sequence': 1}
    """
    sizes: dict[str, int] = {name: 1 for name in AXES}
    seen = set()
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or name in seen or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh must be like data=2,tensor=2,sequence=2, each axis at most once and of at "
                f"least one device, got {text!r}"
            )
        seen.add(name)
        sizes[name] = int(size)
    return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run of a byte-level language model.

    Compiled programs are kept for the next start in fsa-jax/compiled of the user's cache folder;
    the environment variable JAX_COMPILATION_CACHE_DIR names another folder, or none if it is empty.

    Attributes:
      data: text files, or folders to search for text files. Default: the source of this Python's
        standard library.
      out: folder to write to. Default: runs/PRESET-ATTENTION-seedSEED.
      preset: the defaults that all other flags start from. tiny: minutes on two CPU cores. small:
        about 90 million parameters and rows of 8192 bytes, for a GPU.
      steps: step to stop after.
      seed: seed of the parameters, of the order of the data and of dropout.
      resume: go on from the last checkpoint in out, bitwise as if the run had never stopped.
      overwrite: replace the run that is in out.
      eval_every: steps between two held-out losses.
      eval_rows: rows of the fixed held-out set.
      checkpoint_every: steps between two checkpoints; the last two are kept.
      batch_size: rows of a step.
      row_length: bytes of a row.
      learning_rate: peak of the learning rate.
      weight_decay: decoupled weight decay, on matrices only.
      warmup_steps: steps of the linear warmup from 0 to the peak.
      decay_steps: step at which the cosine, from the peak on, reaches a tenth of the peak. The
        rate stays there afterwards. Default: steps, or the end of a longer warmup. A resumed run
        keeps the value of its checkpoint, also where it is made longer: give decay_steps at the
        start if the run is to go on beyond steps.
      mesh: devices of each axis, for example data=4,tensor=2,sequence=1: rows of a batch, heads,
        and tokens of a row are split over them. Default: one device. A resumed run may change it.
      fsdp: split parameters and optimiser state over the data axis too.
      distributed: this is one of several processes of a run, which all see the folder out.
      model: sizes of the model.

    Raises:
      ValueError: a field breaks its rule; the message names it and gives the value.
    """

    data: tuple[Path, ...] = ()
    out: Path | None = None
    preset: Literal["tiny", "small"] = "tiny"
    steps: int
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    eval_every: int
    eval_rows: int
    checkpoint_every: int
    batch_size: int
    row_length: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    decay_steps: int | None = None
    mesh: str = ""
    fsdp: bool = False
    distributed: bool = False
    model: TransformerConfig

    def __post_init__(self):
        for name, least in (
            ("steps", 1),
            ("seed", 0),
            ("eval_every", 1),
            ("eval_rows", 1),
            ("checkpoint_every", 1),
            ("batch_size", 1),
            ("row_length", 2),
            ("warmup_steps", 0),
            ("decay_steps", 1),
        ):
            value = getattr(self, name)
            if value is not None or name != "decay_steps":
                object.__setattr__(self, name, scalars.size(name, value, least))
        if self.seed >= 2**31:
            raise ValueError(f"seed must be below 2**31, got {self.seed}")
        for name, rule, fits in (
            ("learning_rate", "positive and finite", lambda x: 0 < x < math.inf),
            ("weight_decay", "at least 0 and finite", lambda x: 0 <= x < math.inf),
        ):
            value = scalars.number(name, getattr(self, name), rule, fits)
            object.__setattr__(self, name, value)
        if self.warmup_steps >= self.last_decay_step:
            raise ValueError(
                "warmup_steps must be below decay_steps, got "
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps}"
            )
        parse_mesh(self.mesh)
        if not isinstance(self.out, Path | None):
            raise ValueError(f"out must be a pathlib.Path or None, got {self.out!r}")
        if self.resume and self.overwrite:
            raise ValueError(
                "resume and overwrite must not both be set, got resume=True and overwrite=True"
            )
        if self.model.vocab_size != VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be {VOCAB_SIZE} (256 bytes and the document start), got "
                f"{self.model.vocab_size}"
            )

    @property
    def run_folder(self) -> Path:
        """Where the run writes: `out`, or the default folder that its settings name."""
        default = Path("runs") / f"{self.preset}-{self.model.attention}-seed{self.seed}"
        return default if self.out is None else self.out

    @property
    def last_decay_step(self) -> int:
        """Step from which on the learning rate is constant."""
        if self.decay_steps is not None:
            return self.decay_steps
        return max(self.steps, self.warmup_steps + 1)


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values; `config_from_json` is its inverse."""
    values = dataclasses.asdict(config)
    values["data"] = [str(path) for path in config.data]
    values["out"] = None if config.out is None else str(config.out)
    return values


def config_from_json(values: Mapping[str, Any]) -> TrainConfig:
    """Builds the configuration that `config_to_json` wrote."""
    fields = dict(values)
    fields["data"] = tuple(Path(path) for path in fields["data"])
    fields["out"] = None if fields["out"] is None else Path(fields["out"])
    fields["model"] = TransformerConfig.from_dict(fields["model"])
    return TrainConfig(**fields)


def check_resumable(saved: TrainConfig, wanted: TrainConfig) -> None:
    """Raises ValueError, naming every difference, unless `wanted` can go on where `saved` was."""
    before, now = _flat(config_to_json(saved)), _flat(config_to_json(wanted))
    differences = [
        f"{name}={now.get(name)!r} (checkpoint: {before.get(name)!r})"
        for name in sorted(before.keys() | now.keys())
        if name not in FREE_ON_RESUME and before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            "resume must keep the settings of the checkpoint, got " + ", ".join(differences)
        )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat.update(_flat(value) if isinstance(value, Mapping) else {name: value})
    return flat


PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        preset="tiny",
        steps=600,
        eval_every=100,
        eval_rows=128,
        checkpoint_every=100,
        batch_size=4,
        row_length=512,
        learning_rate=3e-3,
        weight_decay=0.1,
        warmup_steps=50,
        model=TransformerConfig(
            vocab_size=VOCAB_SIZE,
            num_layers=4,
            embed_dim=128,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            mlp_dim=384,
            nsa=NSAConfig(
                kernel_size=16,
                kernel_stride=8,
                block_size=16,
                topk=8,
                init_blocks=1,
                local_blocks=2,
                window_size=64,
            ),
        ),
    ),
    "small": TrainConfig(
        preset="small",
        steps=20_000,
        eval_every=500,
        eval_rows=32,
        checkpoint_every=1000,
        batch_size=8,
        row_length=8192,
        learning_rate=6e-4,
        weight_decay=0.1,
        warmup_steps=500,
        model=TransformerConfig(
            vocab_size=VOCAB_SIZE,
            num_layers=12,
            embed_dim=768,
            num_heads=12,
            num_kv_heads=4,
            head_dim=64,
            mlp_dim=2048,
            remat=True,
            dtype="bfloat16",
        ),
    ),
}
