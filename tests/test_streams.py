"""Random streams are pure functions, different uses are unrelated, and their values are frozen."""

from __future__ import annotations

import torch

from dreamrie.streams import derive_seed, stream_generator


def test_equal_arguments_give_equal_numbers_and_nothing_else_does() -> None:
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 1), (1, "a", 0)]
    seeds = [derive_seed(*key) for key in keys]
    assert seeds == [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_counters_do_not_run_together() -> None:
    """(1, 23) and (12, 3) are different places."""
    assert derive_seed(0, "s", 1, 23) != derive_seed(0, "s", 12, 3)


def test_the_derived_seed_is_frozen() -> None:
    """A changed derivation would silently change every run; this value was fixed with version 0.1."""
    assert derive_seed(7, "training/concept/noise", 3) == 7_963_133_712_541_860_542


def test_generators_leave_the_global_one_alone() -> None:
    before = torch.random.get_rng_state()
    first = torch.rand(3, generator=stream_generator(0, "x", 1))
    assert torch.equal(first, torch.rand(3, generator=stream_generator(0, "x", 1)))
    assert not torch.equal(first, torch.rand(3, generator=stream_generator(0, "x", 2)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_stream_of_texts_is_frozen() -> None:
    """This value was fixed when texts came."""
    assert derive_seed(7, "training/order", 3) == 7_238_311_565_011_637_919
