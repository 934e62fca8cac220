"""The values of the flags of `fsa-jax train` that are not given on the command line."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fsa_jax.messages import say
from fsa_jax.training.config import (
    PRESETS,
    TrainConfig,
    config_of_run,
    default_folder,
    read_config,
)
from fsa_jax.training.folder import DESCRIPTION, TOKENIZER, has_checkpoint
from fsa_jax.transformer_config import LAYER_TYPES, SIZES, with_sizes


def defaults_of_train(arguments: Sequence[str]) -> TrainConfig:
    """The values of flags that are not given: of a preset, of other runs, or of a model.

    They are those of the run that is resumed; otherwise those of `--config` or the preset, with the
    model and the tokenizer of `--init`. The flags that say which, and the model sizes that others
    are derived from, are read before all others. Errors in them are left to the full parser.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", choices=PRESETS)
    first.add_argument("--resume", action=argparse.BooleanOptionalAction)
    for name in ("config", "init", "out"):
        first.add_argument(f"--{name}", type=Path)
    first.add_argument("--tokenizer")
    first.add_argument("--seed", type=int, default=0)
    first.add_argument("--attention", choices=LAYER_TYPES)
    first.add_argument("--layer-types", "--layer_types", nargs="*", choices=LAYER_TYPES)
    for name in SIZES:
        first.add_argument(f"--{name.replace('_', '-')}", f"--{name}", type=int)
    try:
        found = first.parse_known_args(arguments)[0]
    except argparse.ArgumentError:
        return PRESETS["tiny"]
    if found.preset and found.config:
        raise ValueError(
            "preset and config must not both be given, got "
            f"{found.preset!r} and {str(found.config)!r}"
        )
    default = read_config(found.config) if found.config else PRESETS[found.preset or "tiny"]
    resumed = None
    if found.resume:
        types = found.layer_types or [found.attention or default.model.attention]
        attention = types[0] if len(set(types)) == 1 else "hybrid"
        folder = found.out or default_folder(default.preset, attention, found.seed)
        resumed = _settings_of_run(folder, found.preset)
    if found.init and resumed is None:
        from fsa_jax.training.start import with_init

        keep_attention = found.config is not None
        return with_init(
            default, found.init, tokenizer=found.tokenizer, keep_attention=keep_attention
        )
    default = resumed or default
    sizes = {name: size for name in SIZES if (size := getattr(found, name)) is not None}
    default = dataclasses.replace(default, model=with_sizes(default.model, sizes))
    return _with_tokenizer(default, found.tokenizer or default.tokenizer)


def _settings_of_run(folder: Path, preset: str | None) -> TrainConfig | None:
    """The settings of the run in a folder; None without a run, or where another preset is given."""
    if not has_checkpoint(folder):
        return None  # the run reports it
    saved = config_of_run(folder)
    if saved is None:
        say(
            f"{folder / DESCRIPTION} cannot be read: flags that are not given are not as in the run"
        )
        return None
    if preset not in (None, saved.preset):
        return None
    # The run has a copy of its tokenizer, whose original may be gone.
    own = {"tokenizer": str(folder)} if (folder / TOKENIZER).is_file() else {}
    settings = dataclasses.replace(saved, out=None, resume=False, overwrite=False, **own)
    return dataclasses.replace(settings, distributed=False)


def _with_tokenizer(default: TrainConfig, name: str) -> TrainConfig:
    """The default configuration with the vocabulary of a tokenizer."""
    from fsa_jax.training.tokenizer import load_tokenizer

    if name in ("", default.tokenizer):  # an empty name is left to the full parser
        return default
    model = dataclasses.replace(default.model, vocab_size=load_tokenizer(name).vocab_size)
    return dataclasses.replace(default, tokenizer=name, model=model)
