"""The configuration of a training run: one dataclass, and the presets, which are values of it."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fsa_jax.arguments import scalars
from fsa_jax.config import NSAConfig
from fsa_jax.training.folder import read_description
from fsa_jax.training.renamed import renamed_fields, with_new_names
from fsa_jax.transformer import TransformerConfig

# The vocabulary: the token ids 0..255 are bytes, and one more id starts every document.
DOCUMENT_START = 256
VOCAB_SIZE = 257
#: The name of the tokenizer of these ids.
BYTES = "bytes"

# A resumed run may change these fields: they say where, for how long and how often a run works, and
# change no number of a training step. All other fields must stay the same. `text` and `tokenizer`
# are compared by their bytes instead.
FREE_ON_RESUME = frozenset(
    {"text", "tokenizer", "out", "preset", "steps", "resume", "overwrite"}
    | {"eval_every", "checkpoint_every", "mesh", "fsdp", "distributed", "tensorboard", "config"}
)

#: The learning rate after its decay, as a fraction of the peak.
FINAL_LEARNING_RATE = 0.1
#: Dtypes of parameters that lose small updates.
_NARROW = ("bfloat16", "float16")
#: Fields that are a path or None.
_PATHS = ("init", "out", "config")
_ATTENTION_WARMUP = re.compile("full:([1-9][0-9]*)")
SCHEDULES = ("cosine", "constant", "wsd")

#: Old names of fields, which callers may use for one more release; files may always have them.
OLD_FIELDS = {"data": "text", "row_length": "seq_len", "eval_rows": "eval_sequences"}

#: The axes of a device mesh, see `fsa_jax.training.mesh`.
AXES = ("data", "tensor", "sequence")


def parse_mesh(text: str) -> dict[str, int]:
    """The number of devices along each mesh axis.

    Args:
      text: axes and their sizes, for example "data=2,tensor=4"; an omitted axis has size 1.

    Raises:
      ValueError: the text does not have that form.

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


@renamed_fields(**OLD_FIELDS)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run of a language model, of bytes or of the tokens of a tokenizer.

    Compiled programs are cached for later runs in fsa-jax/compiled of the user's cache folder. The
    environment variable JAX_COMPILATION_CACHE_DIR names another folder; if it is empty, nothing is
    cached.

    Attributes:
      preset: defaults for all other flags. tiny: trains within minutes on two CPU cores. small:
        about 90 million parameters and sequences of 8192 bytes, for a GPU.
      text: text files; files of records (.jsonl, .jsonl.gz, .parquet); folders that are searched
        for both; or pre-tokenised data, a folder with tokens.npy and offsets.npy or a .npy file.
        Default: the source of this Python's standard library.
      text_column: the column of the text in files of records.
      text_weights: one number for each text: each packed sequence has documents of one of them, in
        proportion to these weights. Default: all documents count alike.
      tokenizer: bytes; or a tokenizer.json, or a folder with one, as Hugging Face writes it, whose
        begin and end tokens start and end each document. The run keeps a copy.
      init: the model that a new run starts from: a folder of Hugging Face with config.json and
        safetensors, or that of another run, whose last checkpoint is used. Its sizes are the
        defaults of the flags, and its tokenizer too; attention=nsa or layer_types start sparse
        attention from a dense one. Default: random parameters.
      out: folder that the run writes to. Default: runs/PRESET-ATTENTION-seedSEED.
      steps: step after which training stops.
      seed: seed of the parameters, the data order and dropout.
      resume: continue from the last checkpoint in out, bitwise as if the run had never stopped.
        What is not given is then as in the run, except distributed.
      overwrite: replace the run that is in out.
      eval_every: steps between two evaluations on the validation set.
      eval_sequences: number of sequences in the fixed validation set.
      checkpoint_every: steps between two checkpoints; the last two are kept.
      batch_size: sequences per step.
      seq_len: tokens per sequence; bytes, without another tokenizer.
      learning_rate: peak learning rate.
      weight_decay: decoupled weight decay, applied to matrices only.
      clip_norm: gradients of a larger global norm are scaled down to this norm; 0 or None: never.
      accumulate: number of parts that a batch is computed in, one after another, each of
        batch_size / accumulate sequences. The gradient is that of the whole batch up to rounding,
        summed in float32, and the memory of activations that of a part.
      freeze: regular expressions of parameters that are not trained, for example
        'layers/attention/(query|key)'. One matches a path, or its beginning up to a slash.
      schedule: learning rate after the warmup. cosine: falls along a cosine to a tenth of the peak.
        constant: stays at the peak. wsd: stays at the peak, and falls linearly to a tenth of it in
        the last cooldown_steps before decay_steps.
      attention_warmup: full:STEPS, to train the first STEPS steps with full attention in the layers
        of sparse attention, and to go on as NSA with the same weights. What full attention does not
        read, gates and compression, keeps its first values until then. Default: none.
      warmup_steps: steps of the linear warmup from 0 to the peak learning rate.
      cooldown_steps: with schedule=wsd, steps of the linear decay. Default: a fifth of decay_steps.
      decay_steps: step at which the decay reaches a tenth of the peak learning rate, where
        it then stays. Default: steps, or the end of a longer warmup. A resumed run keeps the value
        of its checkpoint, even if the run is extended: set decay_steps at the start if the run will
        continue beyond steps.
      mesh: number of devices along each mesh axis, for example data=4,tensor=2,sequence=1: the
        sequences of a batch, the heads, and the tokens of a sequence are split over them. Default:
        one device. A resumed run may change it.
      fsdp: split parameters and optimiser state over the data axis too.
      distributed: this process is one of several of the run; all of them must see the folder out.
      float32_masters: with a param_dtype of 16 bits, keep the parameters in float32 too, in the
        state of the optimiser, and add the updates to these. The 16 bits are their rounding.
      tensorboard: write the metrics for TensorBoard too, to the folder tensorboard in out.
      config: the run.json of another run, whose settings are the defaults of all flags except out,
        resume and overwrite; in its place no preset is given.
      model: sizes of the model.

    Raises:
      ValueError: a field breaks its rule; the message names the field and its value.
    """

    preset: Literal["tiny", "small"] = "tiny"
    text: tuple[Path, ...] = ()
    text_column: str = "text"
    text_weights: tuple[float, ...] = ()
    tokenizer: str = BYTES
    init: Path | None = None
    out: Path | None = None
    steps: int
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    eval_every: int
    eval_sequences: int
    checkpoint_every: int
    batch_size: int
    seq_len: int
    learning_rate: float
    weight_decay: float
    clip_norm: float | None = 1.0
    accumulate: int = 1
    freeze: tuple[str, ...] = ()
    attention_warmup: str | None = None
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: int
    cooldown_steps: int | None = None
    decay_steps: int | None = None
    mesh: str = ""
    fsdp: bool = False
    distributed: bool = False
    float32_masters: bool = True
    tensorboard: bool = False
    config: Path | None = None
    model: TransformerConfig

    def __post_init__(self):
        for name, least in (
            ("steps", 1),
            ("seed", 0),
            ("eval_every", 1),
            ("eval_sequences", 1),
            ("checkpoint_every", 1),
            ("batch_size", 1),
            ("seq_len", 2),
            ("warmup_steps", 0),
            ("decay_steps", 1),
            ("cooldown_steps", 1),
            ("accumulate", 1),
        ):
            value = getattr(self, name)
            if value is not None or name not in ("decay_steps", "cooldown_steps"):
                object.__setattr__(self, name, scalars.size(name, value, least))
        if self.seed >= 2**31:
            raise ValueError(f"seed must be below 2**31, got {self.seed}")
        for name, rule, fits in (
            ("learning_rate", "positive and finite", lambda x: 0 < x < math.inf),
            ("weight_decay", "at least 0 and finite", lambda x: 0 <= x < math.inf),
            ("clip_norm", "at least 0 and finite, or None", lambda x: 0 <= x < math.inf),
        ):
            value = getattr(self, name)
            value = 0.0 if name == "clip_norm" and value is None else value
            object.__setattr__(self, name, scalars.number(name, value, rule, fits))
        if self.warmup_steps >= self.last_decay_step:
            raise ValueError(
                "warmup_steps must be below decay_steps, got "
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps}"
            )
        self._check_step()
        self._check_attention_warmup()
        parse_mesh(self.mesh)
        for name in _PATHS:
            path = getattr(self, name)
            if not isinstance(path, Path | None):
                raise ValueError(f"{name} must be a pathlib.Path or None, got {path!r}")
        if self.resume and self.overwrite:
            raise ValueError(
                "resume and overwrite must not both be set, got resume=True and overwrite=True"
            )
        self._check_text()
        # The size of another vocabulary is known where the tokenizer is read.
        if self.tokenizer == BYTES and self.model.vocab_size != VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be {VOCAB_SIZE} (256 bytes and the document start), got "
                f"{self.model.vocab_size}"
            )
        if self.model.padding_id != 0:
            raise ValueError(
                f"padding_id must be 0, as the trainer packs documents, got {self.model.padding_id}"
            )

    def _check_step(self) -> None:
        """Checks the fields of a training step that depend on others."""
        scalars.choice("schedule", self.schedule, SCHEDULES)
        if self.cooldown_steps is not None and self.schedule != "wsd":
            raise ValueError(
                f"cooldown_steps must come with schedule='wsd', got {self.cooldown_steps} and "
                f"schedule={self.schedule!r}"
            )
        if self.schedule == "wsd" and (
            self.warmup_steps + self.last_cooldown_steps > self.last_decay_step
        ):
            raise ValueError(
                "warmup_steps + cooldown_steps must be at most decay_steps, got "
                f"{self.warmup_steps} + {self.last_cooldown_steps} and {self.last_decay_step}"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate={self.accumulate}, got "
                f"{self.batch_size}"
            )
        if isinstance(self.freeze, str) or not all(isinstance(x, str) and x for x in self.freeze):
            raise ValueError(
                f"freeze must be a tuple of regular expressions, got {scalars.short(self.freeze)}"
            )
        object.__setattr__(self, "freeze", tuple(self.freeze))
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"freeze must hold regular expressions, got {pattern!r}: {error}"
                ) from error
        for name in ("float32_masters", "tensorboard"):
            object.__setattr__(self, name, scalars.flag(name, getattr(self, name)))

    def _check_attention_warmup(self) -> None:
        got = f"got {self.attention_warmup!r}"
        last, model = self.last_full_step, self.model
        if last > self.steps:
            raise ValueError(
                f"attention_warmup must end within the run, {got} and steps={self.steps}"
            )
        if last and "nsa" not in model.types:
            raise ValueError(
                "attention_warmup must be None for a model without layers of sparse attention, "
                f"{got} and attention={model.attention!r}"
            )
        if last and model.kv_per_branch:
            raise ValueError(
                "attention_warmup needs keys and values that all branches share, "
                f"{got} and kv_per_branch=True"
            )

    @property
    def last_full_step(self) -> int:
        """The last step of the attention warm-up; 0 without one."""
        text = self.attention_warmup
        if text is None:
            return 0
        found = _ATTENTION_WARMUP.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(
                "attention_warmup must be None or full:STEPS, with STEPS a positive number, got "
                f"{scalars.short(text)}"
            )
        return int(found[1])

    def warms_attention(self, step: int) -> bool:
        """Whether a step is one of the attention warm-up, counted from 1; also before all steps."""
        return step <= self.last_full_step and self.last_full_step > 0

    @property
    def has_masters(self) -> bool:
        """Whether the state of the optimiser holds float32 copies of the parameters."""
        return self.float32_masters and self.model.param_dtype in _NARROW

    @property
    def last_cooldown_steps(self) -> int:
        """The steps of the linear decay of the schedule wsd."""
        if self.cooldown_steps is not None:
            return self.cooldown_steps
        return -(-self.last_decay_step // 5)

    def _check_text(self) -> None:
        for name in ("text_column", "tokenizer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} must be a text that is not empty, got {value!r}")
        weights = tuple(
            scalars.number("text_weights", x, "positive and finite", lambda x: 0 < x < math.inf)
            for x in self.text_weights
        )
        object.__setattr__(self, "text_weights", weights)
        if weights and len(weights) != len(self.text):
            raise ValueError(
                f"text_weights must be one for each text, got {len(weights)} for {len(self.text)}"
            )

    @property
    def run_folder(self) -> Path:
        """The folder that the run writes to: `out`, or the default, which names its settings."""
        return self.out or default_folder(self.preset, self.model.attention, self.seed)

    @property
    def last_decay_step(self) -> int:
        """The step from which the learning rate is constant."""
        if self.decay_steps is not None:
            return self.decay_steps
        return max(self.steps, self.warmup_steps + 1)


def default_folder(preset: str, attention: str, seed: int) -> Path:
    """The folder of a run that has no other: its name says these settings."""
    return Path("runs") / f"{preset}-{attention}-seed{seed}"


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values; the inverse of `config_from_json`."""
    values = dataclasses.asdict(config) | {"model": config.model.to_dict()}
    values["text"] = [str(path) for path in config.text]
    for name in _PATHS:
        path = getattr(config, name)
        values[name] = None if path is None else str(path)
    values["freeze"] = list(config.freeze)
    values["text_weights"] = list(config.text_weights)
    return values


def config_from_json(values: Mapping[str, Any]) -> TrainConfig:
    """Builds the configuration that `config_to_json` wrote, in this version or an earlier one."""
    fields = with_new_names(values, OLD_FIELDS)
    fields["text"] = tuple(Path(path) for path in fields["text"])
    for name in _PATHS:
        path = fields.get(name)
        fields[name] = None if path is None else Path(path)
    fields["freeze"] = tuple(fields.get("freeze", ()))
    fields["text_weights"] = tuple(fields.get("text_weights", ()))
    fields["model"] = model = TransformerConfig.from_dict(fields["model"])
    if model.param_dtype in _NARROW:  # versions without this field kept no such copies
        fields.setdefault("float32_masters", False)
    return TrainConfig(**fields)


def read_config(path: Path) -> TrainConfig:
    """The configuration of another run, from its `run.json`, for a new run.

    Args:
      path: the file. The result names it as `config`, and has the defaults of `out`, `resume` and
        `overwrite`.

    Raises:
      ValueError: the file cannot be read, or is not that of a run.
    """
    try:
        config = config_from_json(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        )
        raise ValueError(
            f"config must be the run.json of a run, got {str(path)!r}: {reason}"
        ) from error
    return dataclasses.replace(config, out=None, resume=False, overwrite=False, config=path)


def config_of_run(folder: Path) -> TrainConfig | None:
    """The configuration in the `run.json` of a run; None where none can be read."""
    try:
        return config_from_json((read_description(folder) or {})["config"])
    except (KeyError, TypeError, ValueError):
        return None


def check_resumable(saved: TrainConfig, wanted: TrainConfig) -> None:
    """Raises ValueError, naming every difference, unless `wanted` can resume the run `saved`."""
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
        eval_sequences=128,
        checkpoint_every=100,
        batch_size=4,
        seq_len=512,
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
        eval_sequences=32,
        checkpoint_every=1000,
        batch_size=8,
        seq_len=8192,
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
