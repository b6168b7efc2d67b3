"""Seeds: a pure function of (seed, stream), pinned for ever."""

import numpy as np
import pytest

from engine.reference.noise import normals, normals_many, philox


@pytest.mark.parametrize(
    ("seed", "stream", "words"),
    [
        # The first is a known answer of Random123 (kat_vectors, counter and key zero); the others are our own pins.
        (0, 0, ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
        (1, 0, ["e3e80670", "e50a0ebc", "95f222c0", "b615aa27"]),
        (2**63 + 5, 2**40 + 3, ["2aeb31c3", "a0b1bd6b", "07cc3ccd", "fbdcde32"]),
    ],
)
def test_words_are_pinned(seed, stream, words):
    assert [f"{word:08x}" for word in philox(seed, stream, 1)[0]] == words


def test_normals_are_pinned():
    expected = [0.47255403, 0.42634463, 0.08773203, -0.9139684]
    np.testing.assert_allclose(normals(3, 0, 4), expected, rtol=2e-7)


def test_a_longer_draw_begins_with_the_shorter_one():
    np.testing.assert_array_equal(normals(7, 1, 512)[:5], normals(7, 1, 5))


def test_many_draws_at_once_are_those_of_one_at_a_time():
    seeds, streams = [3, 2**64 - 1, 0], [0, 5, 2**40]
    one = [normals(seed, stream, 7) for seed, stream in zip(seeds, streams, strict=True)]
    np.testing.assert_array_equal(normals_many(seeds, streams, 7), one)


def test_streams_and_seeds_are_independent():
    draws = np.stack([normals(seed, stream, 4096) for seed in (0, 1) for stream in (0, 1)])
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.06


def test_moments_are_those_of_a_standard_normal():
    x = normals(11, 0, 200_000).astype(float)
    # Five standard errors of the mean, the variance and the fourth moment.
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs(x.var() - 1) < 5 * np.sqrt(2 / x.size)
    assert abs((x**4).mean() - 3) < 5 * np.sqrt(96 / x.size)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match="out of range"):
        normals(seed, 0, 4)
