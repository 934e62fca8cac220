"""The command line: `fsa-jax` and its commands, which `_run` lists."""

import argparse
import codecs
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fsa_jax.messages import PROGRAM, say, say_now

if TYPE_CHECKING:
    from fsa_jax.training.stopping import RunStopped

_TRAIN_EXTRA = frozenset({"grain", "matplotlib", "orbax", "pyarrow", "tokenizers", "tqdm", "tyro"})
#: Old names of flags of `train`, which work for one more release.
_OLD_FLAGS = {"data": "text", "row-length": "seq-len", "eval-rows": "eval-sequences"}
_INSTALL_EXTRA = "in a clone of fsa-jax, pip install '.[train]' installs it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Continues a prompt with a trained model.

    Attributes:
      checkpoint: folder of a run of `fsa-jax train`, whose last checkpoint is used.
      prompt: text to continue; if it is empty, the model starts a document. Prompt and continuation
        may be longer than the training sequences, but the model was not trained on such positions.
      max_bytes: generation ends with the token that makes the continuation this many bytes long.
      max_tokens: maximum number of tokens to generate. Default: max_bytes.
      temperature: 0 takes the most likely token at each step; 1 samples from the model's
        distribution. The tokens are bytes, unless the run had another tokenizer.
      top_p: sample only from the smallest set of most likely tokens whose total probability is at
        least this.
      seed: the same seed gives the same text.
      stop: generation ends once the model has generated this text; if it is empty, it ends after
        max_bytes. It always ends at an end token of the tokenizer.
    """

    checkpoint: Path
    prompt: str = ""
    max_bytes: int = 256
    max_tokens: int | None = None
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0
    stop: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: the arguments after the program's name; None: those of the process.

    Returns:
      The exit code: 0 for success; 1 if a run failed, or a file cannot be read or written; 2 for an
      error in the arguments; 128 plus the signal number if a signal ended a run (130 after Ctrl-C,
      143 after SIGTERM).
    """
    try:
        code = _run(arguments)
        if sys.stdout is not None:  # it is None if the process was started with a closed stdout
            sys.stdout.flush()
        return code
    except OSError as error:
        # The reader of a pipe, such as `head`, has read enough: that is not an error to report.
        if not isinstance(error, BrokenPipeError):
            named = error.filename is not None and error.strerror is not None
            _print_error(f"{error.filename}: {error.strerror}" if named else str(error))
        _discard_output()
        return 1


def _run(arguments: Sequence[str] | None) -> int:
    """Like `main`, but raises OSError."""
    commands: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
        "train": (_train, "train a language model with sparse or full attention"),
        "sample": (_sample, "continue a prompt with a trained model"),
        "eval": (_eval, "evaluate models: loss by position, retrieval from long contexts"),
        "convert": (_convert, "convert a model from or to the files of Hugging Face"),
        "bench": (_bench, "time kernels, the operator and models, and write a report"),
        "tune": (_tune, "measure kernel tile sizes on this GPU and write a table of the fastest"),
        "info": (_info, "show devices, versions, and the implementation used for each function"),
    }
    parser = _Parser(
        prog=PROGRAM,
        description="Native sparse attention (NSA) for JAX.",
        epilog="commands:\n"
        + "".join(f"  {name:8}{text}\n" for name, (_, text) in commands.items())
        + f"\n`{PROGRAM} COMMAND --help` shows the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("command", nargs="?", choices=commands, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = argparse.Namespace(command=None)
    try:
        parser.parse_args(arguments, parsed)
        if parsed.version:
            from fsa_jax import __version__

            print(f"{PROGRAM} {__version__}")
        elif parsed.command is None:
            parser.print_help()
        else:
            commands[parsed.command][0](parsed.arguments)
    except SystemExit as stop:  # argparse and tyro end this way after --help and after errors
        return stop.code if isinstance(stop.code, int) else 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _TRAIN_EXTRA:
            raise
        return _print_error(f"{parsed.command} needs the package {error.name!r}: {_INSTALL_EXTRA}")
    # The library raises these for invalid arguments, with messages written for the caller.
    except (ValueError, NotImplementedError) as error:
        return _print_error(str(error))
    except ArithmeticError as error:  # a loss is not finite, or a benchmark's result is wrong
        _print_error(str(error))
        return 1
    except KeyboardInterrupt:
        _print_error("interrupted")
        return 130
    return 0


def _discard_output() -> None:
    """Discards output that cannot be written, so that Python's flush at exit does not fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _print_error(message: str) -> int:
    """Prints an error as one line; returns the exit code 2."""
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parse[Flags](
    flags: type[Flags],
    command: str,
    arguments: Sequence[str],
    default: Flags | None = None,
    more_rules: Sequence[Callable] = (),
    more_options: Sequence[Any] = (),
) -> Flags:
    import tyro

    rules = tyro.constructors.ConstructorRegistry()
    for rule in (_path_rule, *more_rules):
        rules.primitive_rule(rule)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages), rules:
            return tyro.cli(
                flags,
                prog=f"{PROGRAM} {command}",
                args=arguments,
                default=tyro.MISSING_NONPROP if default is None else default,
                # The flags are --topk rather than --model.nsa.topk.
                config=(tyro.conf.OmitArgPrefixes, *more_options),
            )
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_one_line(messages.getvalue())) from stop
        raise


def _path_rule(found):
    """A tyro rule that rejects an empty path, which Python takes for the current directory."""
    import tyro

    if found.type is not Path:
        return None

    def path(words: list[str]) -> Path:
        if not words[0]:
            raise ValueError("a path must not be empty, got ''")
        return Path(words[0])

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=path,
        is_instance=lambda x: isinstance(x, Path),
        str_from_instance=lambda x: [str(x)],
    )


def _scaling_rule(found):
    """A tyro rule for a scaling of RoPE: the dictionary of Hugging Face, as JSON, or none."""
    import tyro

    from fsa_jax.rope_scaling import RoPEScaling, scaling_from_dict

    if found.type != RoPEScaling | None:
        return None

    def scaling(words: list[str]) -> RoPEScaling | None:
        try:
            return scaling_from_dict(json.loads(words[0]))
        except json.JSONDecodeError as error:
            raise ValueError(f"rope_scaling must be JSON, got {words[0]!r}") from error

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=scaling,
        is_instance=lambda x: isinstance(x, RoPEScaling | None),
        str_from_instance=lambda x: [json.dumps(x and x.to_dict())],
    )


def _one_line(box: str) -> str:
    """The message in a box drawn by tyro: its lines up to the first divider, without the frame."""
    lines = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:
        text = line.strip(" │╭╮╰╯")
        if not text.strip("─"):
            break
        lines.append(text)
    return " ".join(lines)


def _train(arguments: Sequence[str]) -> None:
    from fsa_jax.training.renamed import rename_flags
    from fsa_jax.training.stopping import RunStopped, catching_signals

    arguments = rename_flags(arguments, _OLD_FLAGS)

    def at_once(stop: RunStopped) -> None:
        say_now(_how_to_continue(stop, arguments))
        os._exit(128 + stop.signal)

    try:
        with catching_signals(at_once):
            _train_until_stopped(arguments)
    except RunStopped as stop:
        say(_how_to_continue(stop, arguments))
        raise SystemExit(128 + stop.signal) from stop


def _train_until_stopped(arguments: Sequence[str]) -> None:
    from fsa_jax.training import TrainConfig
    from fsa_jax.training.defaults import defaults_of_train

    default = defaults_of_train(arguments)
    config = _parse(TrainConfig, "train", arguments, default, (_scaling_rule,))
    # These imports are slow; --help and errors in the flags do not need them.
    from fsa_jax.training import ProcessLost, train
    from fsa_jax.training.compilation_cache import keep_compiled_programs
    from fsa_jax.training.mesh import is_leader

    keep_compiled_programs()
    try:
        result = train(config)
    except ProcessLost as error:
        _print_error(str(error))
        sys.stdout.flush()
        # At exit jax would wait for the lost process, and then abort.
        os._exit(1)
    if not is_leader():
        return
    print("wrote:")
    for path in result.files:
        print(f"  {path}")
    print(
        f"step {result.step}: validation loss {result.val_loss:.4f} nats/{result.unit} "
        f"({result.val_bits_per_byte:.4f} bits/byte); unigram model {result.unigram_loss:.4f}"
    )


def _how_to_continue(stop: "RunStopped", arguments: Sequence[str]) -> str:
    """The message after a signal has ended a run."""
    name = stop.signal.name
    if stop.saved is not None:
        kept = [word for word in arguments if word not in ("--resume", "--overwrite")]
        command = shlex.join([PROGRAM, "train", *kept, "--resume"])
        return f"{name}: ended; the checkpoint of step {stop.saved} is saved. Go on with: {command}"
    if not stop.trained:
        return f"{name}: ended before the first step; the same command starts the run"
    return f"{name}: ended at once, without a checkpoint; --overwrite starts the run anew"


def _sample(arguments: Sequence[str]) -> None:
    flags = _parse(SampleConfig, "sample", arguments)
    import fsa_jax
    from fsa_jax.arguments import checks
    from fsa_jax.training import load_model
    from fsa_jax.training.printing import TextEnded, TokenPrinter, prompt_tokens
    from fsa_jax.training.tokenizer import tokenizer_of_run

    checks.size("max_bytes", flags.max_bytes, most=math.inf)
    max_tokens = flags.max_bytes
    if flags.max_tokens is not None:
        max_tokens = checks.size("max_tokens", flags.max_tokens, most=math.inf)
    # Arguments that are not valid UTF-8 reach Python as surrogate escapes.
    prompt, stop = (x.encode("utf-8", "surrogateescape") for x in (flags.prompt, flags.stop))
    # The implementation that the run was trained with may not be available here.
    model, config = load_model(flags.checkpoint, implementation=None)
    tokenizer = tokenizer_of_run(flags.checkpoint, config.tokenizer)
    tokens = prompt_tokens(tokenizer, prompt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal whose encoding is not UTF-8 gets question marks rather than an error.
        sys.stdout.reconfigure(errors="replace")
    if tokenizer.unit == "byte":
        printer = _TextPrinter(prompt)
        max_tokens = min(max_tokens, flags.max_bytes)
    else:
        limits = {"stop": flags.stop, "max_bytes": flags.max_bytes}
        printer = TokenPrinter(tokenizer, flags.prompt, tokens, **limits)
        stop = b""  # a text may be spelled in several ways, so the printer looks for it
    try:
        fsa_jax.generate(
            model,
            [tokens],
            max_tokens=max_tokens,
            temperature=flags.temperature,
            top_p=flags.top_p,
            seed=flags.seed,
            stop=stop,
            vocab_size=tokenizer.drawn,
            stream=printer.add,
        )
    except TextEnded:
        pass
    except KeyboardInterrupt:
        printer.finish()  # so that the message starts on a new line
        _print_error("interrupted")
        raise SystemExit(130) from None
    printer.finish()


class _TextPrinter:
    """Prints a text byte by byte as it is generated, with U+FFFD for what is not valid UTF-8."""

    def __init__(self, prompt: bytes):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._prompt = prompt

    def add(self, token) -> None:
        self._write(bytes([token[0]]))

    def finish(self) -> None:
        self._write(b"", final=True)
        print()

    def _write(self, new: bytes, final: bool = False) -> None:
        text = self._decoder.decode(self._prompt + new, final)
        # The prompt is printed with the first byte, and so never before an error in the arguments.
        self._prompt = b""
        print(text, end="", flush=True)


def _eval(arguments: Sequence[str]) -> None:
    import tyro

    from fsa_jax.evaluation.config import EvalConfig

    # The checkpoints are the only argument without a default.
    positional = (tyro.conf.PositionalRequiredArgs,)
    config = _parse(EvalConfig, "eval", arguments, more_options=positional)
    from fsa_jax.evaluation import evaluate
    from fsa_jax.evaluation.report import sections
    from fsa_jax.training.compilation_cache import keep_compiled_programs

    keep_compiled_programs()
    result = evaluate(config)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    for section in sections(result.values):
        print(f"{section.title}\n\n{section.table}\n{section.legend}\n")
    print("wrote:")
    for path in result.files:
        print(f"  {path}")


def _convert(arguments: Sequence[str]) -> None:
    import tyro

    from fsa_jax.config import NSAConfig
    from fsa_jax.training.convert import ConvertConfig, convert
    from fsa_jax.training.renamed import given_flags

    default = ConvertConfig(source=tyro.MISSING, target=tyro.MISSING, nsa=NSAConfig())
    config = _parse(ConvertConfig, "convert", arguments, default)
    sizes = {field.name.replace("_", "-") for field in dataclasses.fields(NSAConfig)}
    # Sizes that are given mean something even where they are the default ones.
    if not sizes & given_flags(arguments):
        config = dataclasses.replace(config, nsa=None)
    print(f"wrote {convert(config)}")
    if config.to == "run":
        command = shlex.join([PROGRAM, "train", "--resume", "--out", str(config.target)])
        print(f"train it with: {command}")


def _bench(arguments: Sequence[str]) -> None:
    from fsa_jax.bench.config import BenchConfig
    from fsa_jax.bench.report.markdown import report
    from fsa_jax.bench.run import bench

    config = _parse(BenchConfig, "bench", arguments, BenchConfig())
    if config.report is None:
        for path in bench(config):
            print(f"wrote {path}")
    report(config.report or config.out, config.out)
    print(f"wrote {config.out / 'benchmarks.md'}")


def _tune(arguments: Sequence[str]) -> None:
    from fsa_jax.bench.tune import TuneConfig, tune

    print(f"wrote {tune(_parse(TuneConfig, 'tune', arguments, TuneConfig()))}")


def _info(arguments: Sequence[str]) -> None:
    parser = _Parser(
        prog=f"{PROGRAM} info",
        description="Shows devices, versions, and the implementation used for each function.",
    )
    parser.parse_args(arguments)
    import jax

    import fsa_jax
    from fsa_jax.versions import versions

    print("versions:")
    for name, version in versions().items():
        print(f"  {name:18}{version}")
    print("devices:")
    for device in jax.devices():
        print(f"  {device.platform}:{device.id}  {device.device_kind}")
    print("functions:")
    for name, (implementation, reason) in fsa_jax.explain().items():
        print(f"  {name:25}{implementation:11}{reason}")


if __name__ == "__main__":
    sys.exit(main())
