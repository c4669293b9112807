"""Orders computed one element at a time: complete, as random as a drawn permutation, and small."""

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest

from dinov2.data.randomness import Stream, random_order

LVD = 142_109_386  # images of the paper's data set


def order(length: int, number: int = 0, seed: int = 0) -> list[int]:
    permutation = random_order(length, seed, Stream.ORDER, number)
    return [permutation[position] for position in range(length)]


def deviations(counts: np.ndarray, freedom: int) -> float:
    """Chi-square of counts that should be equal, in standard deviations from its mean."""
    expected = counts.mean()
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("lengths", [range(1, 130), (997, 1023, 1024, 1025, 4095, 4096, 4099, 7919, 65_537)])
def test_every_element_once(lengths: tuple[int, ...]) -> None:
    for length in lengths:
        assert sorted(order(length)) == list(range(length)), length


def test_orders_depend_on_every_argument() -> None:
    orders = [random_order(1000, *arguments) for arguments in itertools.product((0, 1), Stream, (0, 1))]
    assert len({tuple(one[i] for i in range(100)) for one in orders}) == len(orders)
    assert order(1000, 3, seed=5) == order(1000, 3, seed=5)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6])
def test_all_orders_of_few_are_equally_likely(length: int) -> None:
    orders = math.factorial(length)
    number = max(2000, 50 * orders)
    counts = Counter(tuple(order(length, i)) for i in range(number))
    assert len(counts) == orders
    assert abs(deviations(np.array(list(counts.values())), orders - 1)) < 4.5


@pytest.mark.parametrize("length", [10, 13, 30])
def test_elements_and_pairs_are_uniform(length: int) -> None:
    places, pairs = np.zeros((length, length)), np.zeros((length, length))
    for i in range(3000):
        one = order(length, i)
        places[range(length), one] += 1
        pairs[one[0], one[1]] += 1
    assert abs(deviations(places, (length - 1) ** 2)) < 4.5
    assert abs(deviations(pairs[~np.eye(length, dtype=bool)], length * (length - 1) - 1)) < 4.5


def test_neighbours_in_a_large_order_are_strangers() -> None:
    permutation = random_order(LVD, 0, Stream.ORDER, 0)
    elements = np.array([permutation[position] for position in range(20_000)])
    assert len(set(elements)) == len(elements)
    for values in (elements, np.diff(elements) % LVD, np.diff(elements, n=2) % LVD):
        counts, _ = np.histogram(values, bins=100, range=(0, LVD))
        assert abs(deviations(counts, 99)) < 4.5


def test_an_order_takes_no_time_to_draw() -> None:
    start = time.perf_counter()
    for number in range(100):
        assert 0 <= random_order(10**12, 0, Stream.ORDER, number)[10**12 - 1] < 10**12
    assert time.perf_counter() - start < 1
