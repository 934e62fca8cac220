"""Lazy packages, whose names are imported on first use."""

import importlib

import pytest

import fsa_jax
import fsa_jax.training


@pytest.mark.slow
def test_all_public_names_are_there():
    assert set(fsa_jax.__all__) <= set(dir(fsa_jax))
    for name in fsa_jax.__all__:
        found = getattr(fsa_jax, name)
        # the types of implementation names are from typing.Literal
        assert name.isupper() or found.__module__.startswith(("fsa_jax.", "typing")), name


@pytest.mark.parametrize("package", [fsa_jax, fsa_jax.training])
def test_names_come_from_their_modules(package):
    fresh = importlib.reload(package)  # reload drops the names that were already resolved
    exported = {name for name in dir(fresh) if not name.startswith("_")} - {"TYPE_CHECKING", "lazy"}
    for name in exported:
        value = getattr(fresh, name)
        assert vars(fresh)[name] is value, name  # the name is cached, so later uses do no lookup
    with pytest.raises(
        AttributeError, match=f"module '{package.__name__}' has no attribute 'nope'"
    ):
        fresh.nope  # noqa: B018


def test_modules_need_no_import_of_their_own():
    assert fsa_jax.layers is importlib.import_module("fsa_jax.layers")  # pyright: ignore
