"""Encoded rows: errors as theory has them, and products on the codes that equal those of the decoded rows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_jax.influence import quantise
from duet_jax.influence.quantise import FORMATS, Rows


def gaussian(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("format", FORMATS)
def test_the_error_of_a_coordinate_is_that_of_theory(format: str) -> None:
    rows = 1e-6 * gaussian(64, 4096)
    error = np.sqrt(np.mean((np.asarray(quantise.decode(quantise.encode(rows, format))) - rows) ** 2, axis=1))
    rms = np.sqrt(np.mean(rows**2, axis=1))
    largest = np.abs(rows).max(axis=1)
    expected = {
        "float32": 0 * rms,
        # Uniform within a binade, where steps are 2**-7 of its lower end.
        "bfloat16": 2**-7 / np.sqrt(12) * np.sqrt(np.mean(4 ** np.floor(np.log2(np.abs(rows))), axis=1)),
        "int8": largest / 127 / np.sqrt(12),
        "int4": largest / 7 / np.sqrt(12),
        "1bit": np.sqrt(1 - 2 / np.pi) * rms,
    }[format]
    np.testing.assert_allclose(error, expected, rtol=0.1)
    np.testing.assert_allclose(error.mean(), expected.mean(), rtol=0.01)


def test_codes_are_packed_in_planes_and_int8_is_plain() -> None:
    row = np.array([[7, -7, 3, -1, 0, 5, -4, 2]], np.float32) / 7
    np.testing.assert_array_equal(quantise.encode(row, "int8").codes[0], np.round(row[0] * 127))
    nibbles = [7, -7, 3, -1, 0, 5, -4, 2]
    packed = [(nibbles[i] & 15) | (nibbles[i + 4] & 15) << 4 for i in range(4)]
    np.testing.assert_array_equal(quantise.encode(row, "int4").codes[0], packed)
    np.testing.assert_array_equal(quantise.encode(row, "1bit").codes[0], [0b01001010])


@pytest.mark.parametrize("format", FORMATS)
def test_minus_a_row_has_minus_the_codes(format: str) -> None:
    rows = gaussian(5, 96)
    plus, minus = (np.asarray(quantise.decode(quantise.encode(sign * rows, format))) for sign in (1, -1))
    np.testing.assert_array_equal(plus, -minus)


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_is_encoded_alike_in_every_batch(format: str) -> None:
    rows = gaussian(37, 416)
    whole = quantise.encode(rows, format)
    for size in (5, 36):
        for start in range(0, 37, size):
            part = quantise.encode(rows[start : start + size], format)
            np.testing.assert_array_equal(part.codes, whole.codes[start : start + size])
            np.testing.assert_array_equal(part.scales, whole.scales[start : start + size])


@given(
    row=st.lists(st.floats(-8, 8, width=16, allow_subnormal=False), min_size=32, max_size=32),
    format=st.sampled_from(["int8", "int4"]),
    power=st.integers(-40, 40),
)
def test_integer_codes_are_within_half_a_step_whatever_the_scale(row: list[float], format: str, power: int) -> None:
    rows = np.array([row], np.float32)
    encoded = quantise.encode(rows, format)
    error = np.abs(np.asarray(quantise.decode(encoded)) - rows)
    assert error.max() <= 0.5001 * float(encoded.scales[0])
    np.testing.assert_array_equal(quantise.encode(rows * np.float32(2.0**power), format).codes, encoded.codes)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_nothing_are_zero(format: str) -> None:
    encoded = quantise.encode(np.full((2, 32), 1e-36, np.float32), format)
    np.testing.assert_allclose(quantise.decode(encoded), 0, atol=2e-36)
    zero = quantise.encode(np.zeros((2, 32), np.float32), format)
    for product in (quantise.dot, quantise.cosine):
        np.testing.assert_array_equal(product(zero, gaussian(2, 32)), np.zeros((2, 2)))
    np.testing.assert_array_equal(quantise.cosine(quantise.encode(gaussian(2, 32), format), zero), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("format", "query_format"),
    [
        *((format, None) for format in FORMATS),
        *(("int8", "int8"), ("int4", "int8"), ("1bit", "int4"), ("int8", "1bit")),
    ],
)
def test_products_on_codes_are_those_of_the_decoded_rows(format: str, query_format: str | None) -> None:
    k = 1056
    rows, queries = quantise.encode(gaussian(9, k), format), jnp.asarray(3e-4 * gaussian(4, k, 1))
    plain = np.asarray(quantise.decode(rows), np.float64)
    given_queries = queries if query_format is None else quantise.encode(queries, query_format)
    wanted = np.asarray(queries if query_format is None else quantise.decode(given_queries), np.float64)
    scale = np.sqrt(k) * 3e-4
    np.testing.assert_allclose(quantise.dot(rows, given_queries), plain @ wanted.T, atol=3e-6 * scale)
    np.testing.assert_allclose(quantise.cosine(rows, given_queries), unit(plain) @ unit(wanted).T, atol=1e-6)


@pytest.mark.parametrize("k", [32, 8224])
def test_integer_products_are_exact_at_the_extremes(k: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.choice([-127, 127, 126, -1], (n, k), p=[0.1, 0.7, 0.1, 0.1]).astype(np.int8) for n in (6, 3))
    a[0], b[0] = 127, 127
    exact = a.astype(np.int64) @ b.astype(np.int64).T
    ones = np.ones(6, np.float32), np.ones(3, np.float32)
    np.testing.assert_array_equal(quantise.dot(Rows(a, ones[0], "int8"), Rows(b, ones[1], "int8")), np.float32(exact))


def test_one_bit_rows_are_not_unpacked_at_once() -> None:
    rows, queries = quantise.encode(gaussian(256, 8192), "1bit"), gaussian(2, 8192)
    memory = quantise.dot.lower(rows, queries).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 256 * 8192 * 4 / 4


def test_one_bit_products_of_gaussian_rows_shrink_as_theory_says() -> None:
    rng = np.random.default_rng(0)
    k, correlation = 32768, 0.4
    queries = rng.standard_normal((32, k)).astype(np.float32)
    rows = (correlation * queries + np.sqrt(1 - correlation**2) * rng.standard_normal((32, k))).astype(np.float32)
    encoded = quantise.encode(rows, "1bit")
    cosines = np.diag(quantise.cosine(encoded, queries))
    ratios = np.diag(quantise.dot(encoded, queries)) / np.sum(rows * queries, axis=1)
    # Four standard errors of a mean over 32 rows.
    assert abs(cosines.mean() - correlation * np.sqrt(2 / np.pi)) < 4 / np.sqrt(32 * k)
    assert abs(ratios.mean() - 2 / np.pi) < 4 / correlation / np.sqrt(32 * k)


def test_what_cannot_be_encoded_or_multiplied_is_said() -> None:
    with pytest.raises(ValueError, match="no row format 'int2'; the formats are float32, bfloat16"):
        quantise.layout("int2", 32)
    with pytest.raises(ValueError, match="rows of 12 coordinates fill no whole bytes in 1bit"):
        quantise.encode(gaussian(1, 12), "1bit")
    with pytest.raises(ValueError, match="rows of k = 64 meet queries of k = 32"):
        quantise.dot(quantise.encode(gaussian(1, 64), "int4"), gaussian(1, 32))
