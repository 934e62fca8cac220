"""The tiers themselves: slices cover every test, and markers with unknown cases are refused."""

import pytest
from tiers import parse_slice

TESTS = """
import pytest

@pytest.mark.fast_cases({fast})
@pytest.mark.essential_cases("b-1")
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("letter", "abcd")
def test_of_many_cases(letter, number):
    pass

@pytest.mark.slow
def test_alone():
    pass
"""


@pytest.fixture
def collect(pytester):
    """Returns a function that lists the tests that pytest would run with the given arguments."""
    pytester.makeconftest("from tiers import *")
    names = ("gpu", "slow", "essential", "fast_cases(*ids)", "essential_cases(*ids)")
    pytester.makeini("[pytest]\nmarkers =\n" + "\n".join(f"    {name}: x" for name in names))

    def run(*words, fast='"a-0", "b-3"', more=""):
        pytester.makepyfile(TESTS.format(fast=fast) + more)
        got = pytester.runpytest_inprocess("-q", "--strict-markers", "--collect-only", *words)
        return [line.partition("::")[2] for line in got.outlines if "::" in line], got

    return run


@pytest.mark.parametrize(
    ("tier", "size", "total"), [("slow", 15, 3), ("not slow", 2, 1), ("slow or not slow", 17, 7)]
)
def test_slices_are_a_partition(collect, tier, size, total):
    whole, _ = collect("-m", tier)
    assert len(whole) == size
    parts = [collect("-m", tier, f"--slice={k}/{total}")[0] for k in range(1, total + 1)]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert max(map(len, parts)) < size or total == 1


def test_cases_that_are_not_named_are_slow(collect):
    assert collect("-m", "not slow")[0] == [f"test_of_many_cases[{x}]" for x in ("a-0", "b-3")]
    assert collect("-m", "essential")[0] == ["test_of_many_cases[b-1]"]
    # The tier of a case does not depend on which other cases are requested.
    assert len(collect("-m", "slow", "-k", "a-0 or a-1")[0]) == 1


def test_those_for_gpus_are_a_group_of_their_own(collect):
    gpu = "pytestmark = pytest.mark.gpu\n"
    assert collect("-m", "slow", more=gpu)[0] == []
    assert len(collect("-m", "gpu", more=gpu)[0]) == 17


@pytest.mark.parametrize("fast", ['"a-0", "e-0"', ""])
def test_a_name_of_no_case_is_refused(collect, fast):
    names, got = collect(fast=fast)
    assert names == []
    wanted = "*fast_cases of test_of_many_cases must name cases of it, got *"
    got.stdout.fnmatch_lines([wanted])
    assert got.ret == pytest.ExitCode.INTERRUPTED


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0"])
def test_a_slice_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"--slice must be K/N|unpack|invalid literal"):
        parse_slice(text)
