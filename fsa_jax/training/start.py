"""What a run starts with: the checks before anything that takes long, its text and parameters.

The parameters are random, or with `TrainConfig.init` those of a folder of Hugging Face or of
another run. Sizes of the model are then those of that folder. The sizes of sparse attention, and
what `keys.OF_A_RUN` names, are the run's own.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from fsa_jax.arguments import checks
from fsa_jax.arguments.types import LayerType
from fsa_jax.pretrained import save_pretrained
from fsa_jax.pretrained.keys import OF_A_RUN
from fsa_jax.pretrained.load import load_params, plan_load
from fsa_jax.training.checkpoint import Checkpoints, load_model, say_if_warming
from fsa_jax.training.config import BYTES, VOCAB_SIZE, TrainConfig
from fsa_jax.training.data import Corpus, TokenCorpus, open_corpus
from fsa_jax.training.folder import TOKENIZER, has_checkpoint
from fsa_jax.training.mesh import Placement, check_placement, is_leader
from fsa_jax.training.optimizer import check_full_attention_trains, split_frozen
from fsa_jax.training.step import abstract_model, init_model
from fsa_jax.training.tensorboard import check_tensorboard
from fsa_jax.training.tokenizer import load_tokenizer
from fsa_jax.transformer_config import TransformerConfig

#: Sizes of attention that a run may change, if its parameters keep their shapes.
_SIZES = frozenset({"nsa", "sliding_window"})
#: The fields of layers of sparse attention as a warm start makes them.
_STARTED = {
    "compression": "linear",
    "gate": "head",
    "gate_bias": True,
    "kv_per_branch": False,
    "compress_after_rope": False,
}


def check_start(config: TrainConfig, placement: Placement) -> None:
    """Raises ValueError if settings do not fit together or not the machine, before any reading."""
    sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    check_placement(placement, config.model, **sizes, accumulate=config.accumulate)
    if config.tensorboard:
        check_tensorboard()
    if config.freeze:
        trained, _ = split_frozen(abstract_model(config.model)[1], config.freeze)
        if config.attention_warmup is not None:
            check_full_attention_trains(trained)
    if config.init is None:
        return
    if config.init.resolve() == config.run_folder.resolve():
        raise ValueError(f"init must be another folder than out, got {str(config.init)!r} for both")
    if not config.resume:  # the checkpoint then has everything
        _check_init(config.init, config.model)


def open_text(config: TrainConfig) -> Corpus | TokenCorpus:
    """The text of a run, as tokens that the model has.

    Raises:
      ValueError: the text or the tokenizer cannot be read, or the vocabulary is too small.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size must be at least the {tokenizer.vocab_size} of tokenizer "
            f"{config.tokenizer!r}, got {config.model.vocab_size}"
        )
    return open_corpus(
        config.text,
        tokenizer=tokenizer,
        column=config.text_column,
        weights=config.text_weights,
    )


def with_init(
    config: TrainConfig,
    init: Path,
    *,
    tokenizer: str | None = None,
    keep_attention: bool = False,
) -> TrainConfig:
    """The configuration of a run that starts from a folder, with its model and its tokenizer.

    Args:
      config: the configuration. The model keeps what is the run's own, and with a dense folder also
        the sizes of sparse attention.
      init: the folder, as of `TrainConfig`.
      tokenizer: tokenizer of the run; None: that of the folder, or bytes.
      keep_attention: whether a dense model becomes one with the attention of `config`.

    Raises:
      ValueError: the folder holds no model that can be loaded, or no tokenizer for it.
    """
    source = _source(init)
    own = {name: getattr(config.model, name) for name in OF_A_RUN}
    if _is_dense(source):
        kept = _SIZES | ({"attention", "layer_types"} if keep_attention else set())
        own |= {name: getattr(config.model, name) for name in kept} | _STARTED
    model = dataclasses.replace(source, **own)
    name = tokenizer or (str(init) if (init / TOKENIZER).is_file() else BYTES)
    if name == BYTES and model.vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"tokenizer must be given where init has no {TOKENIZER} and its vocabulary is not the "
            f"{VOCAB_SIZE} of bytes, got {str(init)!r} with {model.vocab_size} tokens"
        )
    return dataclasses.replace(config, init=init, tokenizer=name, model=model)


def _source(init: Path) -> TransformerConfig:
    """The configuration of the model in a folder."""
    if not init.is_dir():
        raise ValueError(f"init must be the folder of a model or of a run, got {str(init)!r}")
    if has_checkpoint(init):
        with Checkpoints(init) as checkpoints:
            return checkpoints.newest(checkpoints.read_position, quiet=True)[1].config.model
    try:
        return plan_load(init).config
    except ValueError as error:
        raise ValueError(f"init must be the folder of a model or of a run: {error}") from error


def _is_dense(model: TransformerConfig) -> bool:
    return set(model.types) == {"full"}


def _check_init(init: Path, model: TransformerConfig) -> None:
    """Raises ValueError unless a model can start from that of a folder."""
    source = _source(init)
    free = OF_A_RUN | _SIZES
    if _is_dense(source):
        free |= {"attention", "layer_types"}
        if "nsa" in model.types:
            source = dataclasses.replace(source, **_STARTED)
        else:
            free |= _STARTED.keys()
    differences = [
        f"{field.name}={getattr(model, field.name)!r} (init: {getattr(source, field.name)!r})"
        for field in dataclasses.fields(model)
        if field.name not in free and getattr(model, field.name) != getattr(source, field.name)
    ]
    if differences:
        raise ValueError(f"model must be that of init={str(init)!r}, got " + ", ".join(differences))
    if source.types == model.types:
        ours, theirs = (_shapes(x) for x in (model, source))
        for path, shape in ours.items():
            if shape != theirs[path]:
                raise ValueError(
                    f"nsa must keep the shapes of the parameters of init={str(init)!r}, got "
                    f"{model.nsa}, where {'/'.join(path)} has the shape {shape} (init: "
                    f"{theirs[path]})"
                )


def _shapes(model: TransformerConfig) -> Mapping[tuple[str, ...], tuple[int, ...]]:
    params = nnx.traversals.flatten_mapping(abstract_model(model)[1])
    return {path: leaf.shape for path, leaf in params.items()}


def initial_params(config: TrainConfig, model: TransformerConfig, shardings: Any) -> Any:
    """The parameters before the first step, as a pure nested dict.

    Args:
      config: the run, which `check_start` has accepted.
      model: its model on the mesh of the run.
      shardings: the shardings of the parameters.
    """
    init = config.init
    if init is None or config.resume:  # a checkpoint replaces all of them
        return init_model(model, config.seed, shardings)[1]
    if not has_checkpoint(init):
        return _from_folder(init, model, shardings)
    if _source(init).types == model.types:
        return _from_run(init, model, shardings)
    # The layers of a run become layers of other types by way of the files of Hugging Face.
    parent = config.run_folder.absolute().parent
    with tempfile.TemporaryDirectory(prefix=f".{config.run_folder.name}.", dir=parent) as temporary:
        between = Path(temporary) / "model"
        save_pretrained(load_model(init, implementation=None)[0], between)
        return _from_folder(between, model, shardings)


def _from_run(run: Path, model: TransformerConfig, shardings: Any) -> Any:
    with Checkpoints(run) as checkpoints:

        def read(step):
            saved = checkpoints.read_position(step).config
            template = abstract_model(saved.model)[1]
            return saved, checkpoints.read_params(step, _split(template, shardings))

        step, (saved, params) = checkpoints.newest(read)
    if is_leader():
        say_if_warming(run, step, saved)
    dtype = checks.float_dtype("param_dtype", model.param_dtype)
    convert = jax.jit(
        lambda params: jax.tree.map(lambda leaf: leaf.astype(dtype), params),
        out_shardings=shardings,
        donate_argnums=0,
    )
    return convert(params)


def _split(template: Any, shardings: Any) -> Any:
    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, template, shardings)


def _from_folder(folder: Path, model: TransformerConfig, shardings: Any) -> Any:
    plan = plan_load(folder, dtype=model.dtype, param_dtype=model.param_dtype)
    if started := _is_dense(plan.config) and not _is_dense(model):
        types: tuple[LayerType, ...] = model.types
        plan = plan_load(
            folder,
            layer_types=types,
            nsa=model.nsa,
            dtype=model.dtype,
            param_dtype=model.param_dtype,
        )
    flat = nnx.traversals.flatten_mapping(shardings)
    gates = "open" if started and "nsa" in model.types else "closed"
    return load_params(plan, gates=gates, shardings=lambda shapes: flat)
