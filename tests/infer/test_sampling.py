from __future__ import annotations

import itertools

import pytest
import torch

from swba_infer.errors import ConfigError
from swba_infer.sampling import FlowSampler, noise_key


def test_times_fall_from_one_to_zero():
    times = FlowSampler(steps=4, shift=3.0).times()
    assert times[0] == 1
    assert times[-1] == 0
    assert list(times) == sorted(times, reverse=True)
    assert times[1] == pytest.approx(3 * 0.75 / (1 + 2 * 0.75))


def test_noise_is_a_function_of_its_key():
    sampler = FlowSampler()
    key = (7, 0, 3, 1)
    first = sampler.noise(*key, (4, 5))
    assert torch.equal(first, sampler.noise(*key, (4, 5)))
    for i in range(4):
        other = list(key)
        other[i] += 1
        assert not torch.equal(first, sampler.noise(*other, (4, 5)))


def test_keys_of_a_grid_do_not_collide():
    keys = {noise_key(s, l, b, d) for s in range(4) for l in range(8) for b in range(64) for d in range(4)}
    assert len(keys) == 4 * 8 * 64 * 4


def test_a_perfect_model_is_sampled_exactly():
    sampler, clean = FlowSampler(steps=3), torch.randn(6)
    x = sampler.noise(0, 0, 0, 0, (6,))
    start, times = x, sampler.times()
    for t, s in itertools.pairwise(times):
        torch.testing.assert_close(x, (1 - t) * clean + t * start)
        x = sampler.advance(x, clean, t, s)
    assert torch.equal(x, clean)


@pytest.mark.parametrize(
    "bad",
    [{"steps": 0}, {"steps": True}, {"shift": 0.0}, {"context_noise": 1.0}, {"shift": "a"}, {"context_noise": "0"}],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        FlowSampler(**bad)


def test_dicts_are_strict():
    assert FlowSampler.from_dict(FlowSampler(steps=3).to_dict()) == FlowSampler(steps=3)
    with pytest.raises(ConfigError, match="colour"):
        FlowSampler.from_dict({"colour": 1})
