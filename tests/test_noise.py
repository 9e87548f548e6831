"""Noise: known answers, slices, streams that never meet, and the distributions they claim."""

import itertools
import random

import numpy as np
import pytest
import reference
import scipy.stats
import torch

from zoo_hf.noise import Direction, check_names, dropout_seed, entries, parameter_id
from zoo_hf.philox import philox4x32


KNOWN_ANSWERS = [  # Random123's own, for Philox4x32-10
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
DIRECTION = Direction(seed=7, step=3, index=11)
BOTH = pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == words
    assert reference.philox4x32_10(counter, key) == words


def test_philox_broadcasts_keys_and_leaves_its_arguments_alone():
    counter, key = torch.arange(24).view(3, 2, 4), torch.tensor([[1, 2], [3, 4]])
    before = counter.clone(), key.clone()
    words = philox4x32(counter, key)
    assert words.shape == (3, 2, 4)
    for i, j in itertools.product(range(3), range(2)):
        assert words[i, j].tolist() == reference.philox4x32_10(counter[i, j].tolist(), key[j].tolist())
    assert torch.equal(counter, before[0])
    assert torch.equal(key, before[1])


def test_signs_are_the_bits_that_the_layout_names():
    signs = entries(DIRECTION, "head.weight", 0, 300)
    assert signs.tolist() == [reference.sign(*DIRECTION, "head.weight", e) for e in range(300)]


def test_normals_are_box_muller_on_the_words_that_the_layout_names():
    normals = entries(DIRECTION, "head.weight", 0, 301, distribution="gaussian")
    expected = torch.tensor([reference.normal(*DIRECTION, "head.weight", e) for e in range(301)])
    torch.testing.assert_close(normals, expected, rtol=0, atol=2e-6)


@BOTH
def test_a_slice_equals_that_slice_of_the_whole(distribution):
    whole = entries(DIRECTION, "w", 0, 300_000, distribution=distribution)
    for start, stop in [(0, 1), (5, 5), (1, 130), (127, 129), (3, 262_147), (131_071, 300_000)]:
        assert torch.equal(entries(DIRECTION, "w", start, stop, distribution=distribution), whole[start:stop])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_roundings_of_float32(distribution, dtype):
    plain = entries(DIRECTION, "w", 0, 1000, distribution=distribution)
    assert torch.equal(entries(DIRECTION, "w", 0, 1000, distribution=distribution, dtype=dtype), plain.to(dtype))


def test_no_two_streams_share_a_counter_or_a_value():
    names = [Direction(s, t, i) for s in (0, 1, 2**32 - 1) for t in (0, 1, 2**32 - 1) for i in (0, 1, 2**32 - 1)]
    streams = {(d, p): entries(d, p, 0, 256) for d in names for p in ("a", "b", "ab")}
    rows = torch.stack(list(streams.values()))
    agreement = rows @ rows.T / rows.shape[1]  # the mean product of two streams: N(0, 1/256) when they are independent
    worst = agreement.fill_diagonal_(0).abs().max().item()
    assert len(rows.unique(dim=0)) == len(streams) == 81
    assert worst < 5.5 / 16, "3,240 pairs: one beyond 5.5 standard deviations has probability 1e-4"


@BOTH
def test_streams_of_neighbouring_names_are_uncorrelated(distribution):
    count, base = 100_000, entries(DIRECTION, "w", 0, 100_000, distribution=distribution)
    others = [
        entries(direction, name, 0, count, distribution=distribution)
        for direction, name in [
            (DIRECTION._replace(seed=8), "w"),
            (DIRECTION._replace(step=4), "w"),
            (DIRECTION._replace(index=12), "w"),
            (DIRECTION, "v"),
        ]
    ]
    others.append(entries(DIRECTION, "w", 1, count + 1, distribution=distribution))  # its own next entry
    for other in others:
        assert abs((base * other).mean().item()) < 4 / count**0.5


def test_signs_pass_a_chi_square_test_of_their_bytes():
    bits = (entries(DIRECTION, "w", 0, 8 * 200_000) > 0).view(-1, 8).to(torch.int64)
    counts = torch.bincount((bits << torch.arange(8)).sum(1), minlength=256)
    assert 1e-4 < scipy.stats.chisquare(counts.numpy()).pvalue < 1 - 1e-4


def test_normals_pass_a_kolmogorov_smirnov_test():
    normals = entries(DIRECTION, "w", 0, 200_000, distribution="gaussian", dtype=torch.float64).numpy()
    assert scipy.stats.kstest(normals, "norm").pvalue > 1e-4
    # the four places of a block come from different words, so each must pass alone
    for place in range(4):
        assert scipy.stats.kstest(normals[place::4], "norm").pvalue > 1e-4


@BOTH
def test_mean_and_variance_lie_within_four_standard_errors(distribution):
    count = 400_000
    z = entries(DIRECTION, "w", 0, count, distribution=distribution, dtype=torch.float64)
    assert abs(z.mean().item()) < 4 / count**0.5
    assert abs(z.square().mean().item() - 1) <= (4 * (2 / count) ** 0.5 if distribution == "gaussian" else 0)


@BOTH
def test_global_generators_are_left_untouched(distribution):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    entries(DIRECTION, "w", 0, 1000, distribution=distribution)
    dropout_seed(0, 0, 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_dropout_seeds_differ_by_step_and_micro_batch_and_never_use_the_counters_of_entries():
    seeds = {dropout_seed(seed, step, batch) for seed in range(4) for step in range(16) for batch in range(4)}
    assert len(seeds) == 256
    assert dropout_seed(5, 9, 2) == reference.philox4x32_10([2, 4, 0, 9], [5, 0])[0]


def test_names_that_share_an_id_are_refused():
    assert parameter_id("plumless") == parameter_id("buckeroo")  # a well-known collision of CRC-32
    with pytest.raises(ValueError, match="'plumless' and 'buckeroo' have the same 32-bit id"):
        check_names(["weight", "plumless", "buckeroo"])
    check_names(["weight", "weight", "bias"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 3, "stop": 2}, "got 3 and 2"),
        ({"start": -1, "stop": 2}, "got -1 and 2"),
        ({"start": 0, "stop": 2, "distribution": "cauchy"}, "must be one of .* got 'cauchy'"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        entries(DIRECTION, "w", **arguments)


@pytest.mark.parametrize("number", [-1, 2**32])
def test_a_direction_outside_the_counters_range_is_refused_and_not_wrapped(number):
    with pytest.raises(ValueError, match=r"must be in \[0, 2\*\*32\), got Direction"):
        entries(DIRECTION._replace(seed=number), "w", 0, 2)


def test_words_that_come_as_signed_integers_are_the_same_words():
    ones = torch.full((4,), -1, dtype=torch.int32), torch.full((2,), -1, dtype=torch.int32)
    assert philox4x32(*ones).tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stop": 2**39 + 1}, "`stop` must be at most 549755813888"),
        ({"dtype": torch.int8}, "`dtype` must be a floating one"),
    ],
)
def test_entries_beyond_the_counter_or_of_no_floating_dtype_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        entries(Direction(0, 0, 0), "w", 2**39, **({"stop": 2**39} | arguments))
