"""Settings of `fsa-jax bench`, and the state of a run, which the suites read."""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

from fsa_jax.arguments import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Benchmarks the operator and its kernels on this machine, and writes a report.

    On a machine without an NVIDIA GPU the same code runs on tiny sizes, unless lengths or heads are
    given, with kernels that are interpreted or replaced by the portable implementation. Such a run
    is not a measurement, and its files say so.

    Attributes:
      suite: what to run. quick: the most important operator and kernel cases that fit into
        `minutes`.
      out: folder for the JSON files and the report.
      report: only regenerate the report from the JSON files below this folder; nothing is run.
      lengths: sequence lengths in tokens; empty: those of the suite.
      heads: numbers of query and key heads, pair after pair, such as 12 4 40 8; empty: those of
        the suite. The models of the suites training and prefill have fixed heads.
      minutes: no new case starts after this many minutes, or after the suite's share of them if
        several suites run; 0: no limit. The cases left out are recorded.
      rounds: number of timed rounds, of 3 to 10 calls each.
      threads: number of functions compiled in parallel.
      peer_path: a checkout of other projects' kernels, which are timed beside ours; see
        `bench/measure/peers.py`.
    """

    suite: Literal["quick", "kernels", "operator", "training", "prefill", "decode", "all"] = "quick"
    out: Path = Path("runs/bench")
    report: Path | None = None
    lengths: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    minutes: float = 8.5
    rounds: int = 5
    threads: int = 8
    peer_path: Path | None = None

    def __post_init__(self):
        for name in ("rounds", "threads"):
            checks.size(name, getattr(self, name))
        for length in self.lengths:
            checks.size("lengths", length)
        for query, key in self.heads:
            if not 0 < key <= query or query % key:
                raise ValueError(
                    "heads must be pairs (query heads, key heads), the first one a multiple of the "
                    f"second, got {self.heads}"
                )
        if self.heads and self.suite in ("training", "prefill"):
            raise ValueError(
                f"heads must be empty for suite={self.suite!r}, whose models have their own, got "
                f"{self.heads}"
            )
        if self.minutes < 0:
            raise ValueError(f"minutes must not be negative, got {self.minutes}")


@dataclasses.dataclass
class Run:
    """The settings and state of a run."""

    config: BenchConfig
    interpret: bool
    share: float = 1.0
    peers: tuple[str, ...] = ()
    ceilings: dict[str, Any] | None = None
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def late(self) -> bool:
        """Whether this suite's share of the time budget is spent."""
        limit = 60 * self.config.minutes * self.share
        return bool(limit) and time.perf_counter() - self.began > limit
