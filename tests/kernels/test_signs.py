"""The random words are what they were, everywhere, and look random: golden values, statistics, shardings."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from duet_jax.kernels.signs import signs, stream, words
from hypothesis import given
from hypothesis import strategies as st

U32 = st.integers(0, 2**32 - 1)
GOLDEN_STREAMS = {("q", 0): 3071046797, ("q", 1): 3071046798, ("down.b", 29): 3944574168, ("head", 0): 1885987788}
# Of (seed, name, layer): words 0 to 3.
GOLDEN_WORDS = {
    (0, "q", 0): [794996536, 4067253543, 2416421232, 1672100357],
    (1, "q", 0): [659905937, 3529302101, 2579916368, 997576775],
    (0, "q", 1): [3508963782, 2757822911, 139048865, 3648977395],
    (4294967295, "head", 0): [2260283425, 263877407, 412596850, 1138610008],
}
GOLDEN_SIGNS = "+++---++----+-+-+-+++--+----+-++---++-++-+---+-+-+--+--++-++----"


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def words_of_integers(seed: int, stream_: int, index: int) -> int:
    """The same hash in exact integers."""
    first = mix(mix((seed + 0x9E3779B9) % 2**32) ^ stream_)
    second = mix((first + 0x9E3779B9) % 2**32)
    return mix((mix(index ^ first) + second) % 2**32)


def correlation(a, b) -> float:
    """Of two sign vectors, in standard deviations of that of random ones."""
    return float(np.abs(np.mean(np.asarray(a) * np.asarray(b))) * np.sqrt(len(a)))


@given(U32, U32, U32)
def test_words_are_the_hash_in_exact_integers(seed, stream_, index):
    found = words(np.uint32(seed), np.uint32(stream_), np.uint32(index))
    assert int(found) == words_of_integers(seed, stream_, index)
    assert found.dtype == jnp.uint32


def test_golden_values():
    assert {key: int(stream(*key)) for key in GOLDEN_STREAMS} == GOLDEN_STREAMS
    assert int(stream("q", 7)) == (mix(zlib.crc32(b"q")) + 7) % 2**32
    found = {key: [int(w) for w in words(key[0], stream(*key[1:]), jnp.arange(4))] for key in GOLDEN_WORDS}
    assert found == GOLDEN_WORDS
    assert "".join("+" if s > 0 else "-" for s in signs(0, stream("q", 0), 64)) == GOLDEN_SIGNS


def test_signs_are_the_bits_of_the_words():
    bits = [int(w) >> i & 1 for w in words(5, stream("up", 2), jnp.arange(4)) for i in range(32)]
    expected = 1 - 2 * np.array(bits, np.float32)
    np.testing.assert_array_equal(signs(5, stream("up", 2), 100), expected[:100])
    np.testing.assert_array_equal(signs(5, stream("up", 2), 60, start=64), expected[64:124])


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_every_bit_is_fair(seed):
    """Bits of 2^16 words, position by position, and all together: within 5 standard deviations."""
    found = np.asarray(words(seed, stream("down", 3), jnp.arange(1 << 16)))
    ones = (found[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / 256
    assert abs(ones.mean() - 0.5) < 5 * 0.5 / 256 / np.sqrt(32)
    assert len(np.unique(found)) > (1 << 16) - 10


def test_different_streams_seeds_and_places_are_uncorrelated():
    """Neighbouring names, layers and seeds, and shifts of one stream, all pairs: 5 standard deviations."""
    count = 1 << 16
    rows = [signs(0, stream(name, layer), count) for name in ("q", "k", "q.a") for layer in (0, 1, 2)]
    rows += [signs(seed, stream("q", 0), count) for seed in (1, 2, 3, 1 << 31)]
    rows += [signs(0, stream("q", 0) + 0x5BD1E995, count)]
    rows += [np.roll(rows[0], shift) for shift in (1, 2, 31, 32, 33, 64, 576, 8192)]
    worst = max(correlation(a, b) for i, a in enumerate(rows) for b in rows[:i])
    assert worst < 5


def test_products_of_three_and_four_signs_are_fair():
    """The inner products of sketches need signs that are independent four at a time."""
    base = np.asarray(signs(9, stream("gate", 1), 1 << 18))
    for shifts in [(1, 2), (32, 64), (1, 32, 33), (576, 1152, 1728), (8192, 1, 8193)]:
        product = base.copy()
        for shift in shifts:
            product = product * np.roll(base, shift)
        assert abs(product.mean()) * 512 < 5, shifts


def test_streams_do_not_hold_the_same_words_in_another_order():
    first = np.sort(np.asarray(words(0, stream("q", 0), jnp.arange(1 << 14))))
    for other in (stream("q", 1), stream("k", 0)):
        assert len(np.intersect1d(first, np.asarray(words(0, other, jnp.arange(1 << 14))))) < 10


@pytest.mark.parametrize("part", ["seed", "stream", "index"])
def test_one_flipped_bit_flips_half_of_the_word(part):
    rng = np.random.default_rng(0)
    given_ = {name: rng.integers(0, 2**32, 4096, dtype=np.uint32) for name in ("seed", "stream", "index")}
    before = np.asarray(words(**given_))
    for bit in range(32):
        after = np.asarray(words(**given_ | {part: given_[part] ^ np.uint32(1 << bit)}))
        flipped = np.unpackbits((before ^ after).view(np.uint8)).mean()
        assert abs(flipped - 0.5) < 5 * 0.5 / np.sqrt(4096 * 32), bit


def test_compiled_and_mapped_calls_give_the_same_words():
    index, layers = jnp.arange(1000), jnp.arange(5)
    eager = [words(3, stream("o", layer), index) for layer in range(5)]
    compiled = jax.jit(jax.vmap(lambda layer: words(3, stream("o", layer), index)))(layers)
    np.testing.assert_array_equal(np.stack(eager), compiled)
    scanned = jax.lax.map(lambda i: words(jnp.uint32(3), stream("o", 4), i), index)
    np.testing.assert_array_equal(eager[4], scanned)


def test_sharded_calls_give_the_same_words():
    code = """
import jax, jax.numpy as jnp, zlib
from jax.sharding import NamedSharding, PartitionSpec
from duet_jax.kernels.signs import stream, words
mesh = jax.make_mesh((4,), ("data",))
index = jax.device_put(jnp.arange(4096), NamedSharding(mesh, PartitionSpec("data")))
found = jax.jit(lambda i: words(3, stream("o", 4), i))(index)
assert len(found.sharding.device_set) == 4
print(zlib.crc32(bytes(jax.device_get(found))))
"""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    expected = np.asarray(words(3, stream("o", 4), jnp.arange(4096)))
    assert int(done.stdout) == zlib.crc32(bytes(expected))
