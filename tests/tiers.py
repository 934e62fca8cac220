"""Tiers of the tests: which cases are fast, and how the slow tier is divided into slices.

`conftest.py` imports the hooks from here. CONTRIBUTING.md says when to run which tier.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest


class Slice(NamedTuple):
    """Slice `number` of `total`, counted from 1."""

    number: int
    total: int

    def holds(self, node_id: str) -> bool:
        """Whether a test is in the slice, by its name alone, so that other tests have no effect."""
        return zlib.crc32(node_id.encode()) % self.total == self.number - 1


def parse_slice(text: str) -> Slice:
    number, total = map(int, text.split("/"))
    if not 1 <= number <= total:
        raise ValueError(f"--slice must be K/N with K in 1 .. N, got {text}")
    return Slice(number, total)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slice",
        type=parse_slice,
        metavar="K/N",
        help="run the K-th of N slices of the selected tests; together the slices are all of them",
    )


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector: pytest.Module) -> Iterator[None]:
    """Applies the markers that assign the cases of a parametrised test to tiers.

    All cases of a test are known here, even those that the command line does not ask for.
    """
    found = yield
    functions = found if isinstance(found, list) else []  # otherwise None or a test class
    items = [x for x in functions if isinstance(x, pytest.Function)]
    for item in items:
        for marker in item.iter_markers("fast_cases"):
            if case_of(item) not in marker.args:
                item.add_marker(pytest.mark.slow)
        # A test that a GPU test file imports from another file is only in the GPU file's group.
        if any(item.get_closest_marker(group) for group in ("gpu", "compile", "transformers")):
            item.own_markers[:] = [x for x in item.own_markers if x.name != "slow"]
        for marker in item.iter_markers("essential_cases"):
            if case_of(item) in marker.args:
                item.add_marker(pytest.mark.essential)
    for marker in (m for item in items[:1] for m in item.iter_markers()):
        if marker.name in ("fast_cases", "essential_cases"):
            unknown = set(marker.args) - {case_of(item) for item in items}
            if unknown or not marker.args:
                raise collector.CollectError(
                    f"{marker.name} of {items[0].originalname} must name cases of it, "
                    f"got {sorted(unknown)}"
                )
    return found


def case_of(item: pytest.Function) -> str | None:
    """Returns the text in brackets after the name of a parametrised test."""
    return item.callspec.id if hasattr(item, "callspec") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--slice")
    if part is None:
        return
    kept = [item for item in items if part.holds(item.nodeid)]
    config.hook.pytest_deselected(items=[item for item in items if not part.holds(item.nodeid)])
    items[:] = kept
