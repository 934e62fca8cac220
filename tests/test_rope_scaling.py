"""Scaling of RoPE: each against its published formula in plain Python, and against transformers."""

import json
import math

import numpy as np
import pytest

from fsa_jax.rope import LinearScaling, Llama3Scaling, RoPE, YarnScaling, scaling_from_dict


def test_linear_divides_positions():
    # Position interpolation evaluates the trained embedding at position m / factor.
    want = [10000.0 ** (-2 * c / 64) / 4.0 for c in range(32)]
    rope = RoPE(scaling=LinearScaling(factor=4.0))
    np.testing.assert_allclose(rope.inverse_frequencies(64), want, rtol=1e-7)


def test_llama3_case_by_case():
    # This follows the wording of the rule, case by case.
    want = []
    for c in range(32):
        frequency = 500000.0 ** (-2 * c / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            want.append(frequency)
        elif wavelength > 8192 / 1:
            want.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * frequency / 8 + smooth * frequency)
    plain = RoPE(theta=500000.0).inverse_frequencies(64)
    assert len({round(float(f / g), 3) for f, g in zip(want, plain, strict=True)}) > 2  # all cases
    rope = RoPE(theta=500000.0, scaling=Llama3Scaling(factor=8.0))
    np.testing.assert_allclose(rope.inverse_frequencies(64), want, rtol=1e-7)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("theta", "width", "length", "fast", "slow"),
    [(1e4, 64, 4096, 32.0, 1.0), (1e6, 128, 32768, 32.0, 1.0), (150.0, 32, 100, 6.0, 0.5)],
)
def test_yarn_channel_by_channel(theta, width, length, fast, slow, truncate):
    """The paper fixes by turns what is kept and what is stretched; between them is a ramp."""
    scaling = YarnScaling(
        factor=8.0,
        original_max_position=length,
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
    )
    got = RoPE(theta=theta, scaling=scaling).inverse_frequencies(width)
    kinds = set()
    # where a (fractional) channel pair turns as often as the betas say, found by bisection
    low, high = (
        bisect(lambda c, b=beta: length * theta ** (-2 * c / width) / (2 * math.pi) - b)
        for beta in (fast, slow)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    assert 0 < low < high < width - 1
    for c in range(width // 2):
        frequency = theta ** (-2 * c / width)
        turns = length * frequency / (2 * math.pi)
        if turns >= fast:
            kinds.add("kept")
            want = frequency
        elif turns <= slow:
            kinds.add("stretched")
            want = frequency / 8
        else:
            kinds.add("ramp")
            part = (c - low) / (high - low)
            want = (1 - part) * frequency + part * frequency / 8
        np.testing.assert_allclose(got[c], want, rtol=1e-6)
    assert kinds == {"kept", "stretched", "ramp"}


def bisect(function):
    """The zero in [0, 200] of a function that falls."""
    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return low


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, 0.1 * math.log(16.0) + 1),
        ({"attention_factor": 1.5, "mscale": 0.5, "mscale_all_dim": 2.0}, 1.5),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        (
            {"mscale": 0.707, "mscale_all_dim": 0.5},
            (0.0707 * math.log(16.0) + 1) / (0.05 * math.log(16.0) + 1),
        ),
        ({"mscale": 0.707}, 0.1 * math.log(16.0) + 1),  # one of the two alone is ignored
        ({"mscale": 0.0, "mscale_all_dim": 1.0}, 0.1 * math.log(16.0) + 1),
    ],
)
def test_attention_factor_of_yarn(options, want):
    scaling = YarnScaling(factor=16.0, original_max_position=4096, **options)
    assert scaling.amplitude == pytest.approx(want, rel=1e-12)


def test_yarn_without_extension_changes_nothing():
    for factor in (1.0, 0.5):
        assert YarnScaling(factor=factor, original_max_position=512).amplitude == 1
    rope = RoPE(scaling=YarnScaling(factor=1.0, original_max_position=512))
    np.testing.assert_array_equal(rope.inverse_frequencies(32), RoPE().inverse_frequencies(32))


@pytest.mark.parametrize("length", [1, 10, 10**9])
def test_yarn_where_no_channel_lies_between_the_betas(length):
    """All channels turn less often than beta_slow, or all more often than beta_fast."""
    rope = RoPE(theta=10.0, scaling=YarnScaling(factor=4.0, original_max_position=length))
    plain = RoPE(theta=10.0).inverse_frequencies(8)
    want = plain if length == 10**9 else plain / 4
    got = rope.inverse_frequencies(8)
    np.testing.assert_allclose(got[1:], want[1:], rtol=1e-6)
    assert got[0] == 1  # the released code never stretches the first pair


#: theta, head width, rope_scaling; from transformers 5.24.0 with torch 2.13.0: its inv_freq at
#: channels spread evenly over the half, and attention_scaling.
GOLDEN = {
    "linear": (
        (10000.0, 64, {"rope_type": "linear", "factor": 4.0}),
        [0.25, 0.04445698, 0.007905695, 0.001405853, 0.00025, 3.333804e-05],
        1.0,
    ),
    "llama3": (
        (
            500000.0,
            128,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        [1.0, 0.0853971, 0.005940731, 6.341514e-05, 4.411535e-06, 3.068926e-07],
        1.0,
    ),
    "yarn": (
        (
            1000000.0,
            128,
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        [1.0, 0.07498942, 0.004131738, 0.0001299315, 5.133812e-06, 3.102344e-07],
        1.138629436111989,
    ),
    "yarn with mscale": (
        (
            10000.0,
            64,
            {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 0.707,
                "mscale_all_dim": 1.0,
            },
        ),
        [1.0, 0.1778279, 0.02687936, 0.002249365, 2.5e-05, 3.333804e-06],
        0.9210423553163399,
    ),
    "yarn with one mscale": (
        (
            10000.0,
            64,
            {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "attention_factor": None,
                "mscale": 0.5,
            },
        ),
        [1.0, 0.1778279, 0.02687936, 0.002249365, 2.5e-05, 3.333804e-06],
        1.3688879454113936,
    ),
    "yarn without rounding": (
        (
            150000.0,
            64,
            {
                "rope_type": "yarn",
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        ),
        [1.0, 0.1070244, 0.006794959, 3.830881e-05, 4.099978e-06, 3.023511e-07],
        1.3465735902799727,
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_equals_transformers(case):
    (theta, width, values), frequencies, amplitude = GOLDEN[case]
    scaling = scaling_from_dict(values)
    assert scaling is not None
    assert scaling.amplitude == pytest.approx(amplitude, rel=1e-12)
    channels = np.linspace(0, width // 2 - 1, 6).astype(int)
    got = RoPE(theta=theta, scaling=scaling).inverse_frequencies(width)[channels]
    np.testing.assert_allclose(got, frequencies, rtol=5e-7)


SCALINGS = [
    LinearScaling(factor=2.5),
    LinearScaling(factor=np.float32(2.0)),  # pyright: ignore[reportArgumentType]
    Llama3Scaling(),
    Llama3Scaling(factor=32, original_max_position=np.int32(4096)),  # pyright: ignore
    YarnScaling(factor=4.0, original_max_position=4096),
    YarnScaling(
        factor=np.float64(40),
        original_max_position=4096,
        beta_fast=16,
        beta_slow=2,
        attention_factor=np.float32(0.5),  # pyright: ignore[reportArgumentType]
        mscale=0.0,
        mscale_all_dim=0.707,
        truncate=np.False_,  # pyright: ignore[reportArgumentType]
    ),
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_dictionaries_go_there_and_back(scaling):
    values = scaling.to_dict()
    assert values["rope_type"] == scaling.rope_type
    assert None not in values.values()
    for got in (values, json.loads(json.dumps(values))):
        again = scaling_from_dict(got)
        assert again == scaling
        assert type(again) is type(scaling)
        assert hash(again) == hash(scaling)
    values["type"] = values.pop("rope_type")
    assert scaling_from_dict(values) == scaling


def test_keys_are_those_of_hugging_face():
    assert Llama3Scaling(factor=32.0).to_dict() == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize("values", [None, {"rope_type": "default"}, {"type": "default"}])
def test_no_scaling(values):
    assert scaling_from_dict(values) is None


def yarn(**options):
    return YarnScaling(**{"factor": 4.0, "original_max_position": 64, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(factor=0), "factor must be a finite number above 0, got 0"),
        (lambda: LinearScaling(factor="2"), "factor must be .* got '2'"),  # pyright: ignore
        (lambda: Llama3Scaling(factor=-1.0), "factor must be .* got -1.0"),
        (lambda: Llama3Scaling(original_max_position=0), "original_max_position must .* got 0"),
        (lambda: Llama3Scaling(high_freq_factor=0.5), "must be above low_freq_factor.*0.5.*1.0"),
        (lambda: yarn(factor=math.nan), "factor must be .* got nan"),
        (lambda: yarn(original_max_position=-5), "original_max_position must be .* got -5"),
        (lambda: yarn(beta_fast=1.0), "beta_fast must be above beta_slow, .*=1.0 .*=1.0"),
        (lambda: yarn(attention_factor=0.0), "attention_factor must be .*, or None, got 0.0"),
        (lambda: yarn(mscale=-0.5), "mscale must be a finite number of at least 0.* got -0.5"),
        (lambda: yarn(mscale_all_dim=True), "mscale_all_dim must be .* got True"),
        (lambda: yarn(truncate=1), "truncate must be True or False, got 1"),
        (lambda: scaling_from_dict([1]), r"must be a mapping .* got \[1\]"),  # pyright: ignore
        (lambda: scaling_from_dict({"factor": 2.0}), "needs one rope_type, got {'factor': 2.0}"),
        (
            lambda: scaling_from_dict({"rope_type": "yarn", "type": "linear"}),
            "needs one rope_type, got .*'yarn'",
        ),
        (
            lambda: scaling_from_dict({"rope_type": "dynamic", "factor": 2.0}),
            r"rope_type must be one of \('linear', .*'default'\), got 'dynamic'",
        ),
        (
            lambda: scaling_from_dict({"rope_type": "yarn", "factor": 2.0}),
            "'yarn' needs the key 'original_max_position_embeddings', got {'factor': 2.0}",
        ),
        (
            lambda: scaling_from_dict({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            r"'rope_theta' \(with the value 10000.0\) is not a key of rope_type 'linear'",
        ),
        (
            lambda: scaling_from_dict({"rope_type": "default", "factor": 2.0}),
            "rope_type 'default' has no other keys, got {'factor': 2.0}",
        ),
        (
            lambda: scaling_from_dict({"rope_type": "linear", "factor": -2.0}),
            "factor must be .* got -2.0",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_values_that_float32_cannot_hold_are_refused():
    """They would give infinite angles, and NaN."""
    with pytest.raises(ValueError, match=r"attention_factor must be .* at most 1000.* got 1e\+30"):
        YarnScaling(factor=4.0, original_max_position=64, attention_factor=1e30)
    with pytest.raises(ValueError, match="scaling must give frequencies that float32 holds, got"):
        RoPE(scaling=LinearScaling(factor=1e-300)).check(8)
    with pytest.raises(ValueError, match=r"theta and scaling .* got theta=1e-300"):
        RoPE(theta=1e-300).check(8)
