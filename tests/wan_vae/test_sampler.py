"""The schedule is the one the checkpoints were trained with, and a seed decides the video."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swba_infer.errors import ConfigError
from swba_infer.sampling import FlowSampler, draw_noise
from swba_infer.wan.sampler import RenoisingSampler

KEY = (7, 0, 3)
SHAPE = (1, 6, 4)


def training_levels(shift: float) -> Tensor:
    """Return the noise levels of the 1000 training steps, as the flow-matching scheduler tabulates them."""
    u = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    return shift * u / (1 + (shift - 1) * u)


def test_warped_timesteps_are_rows_of_the_training_schedule() -> None:
    steps = RenoisingSampler().schedule()
    assert [round(step.timestep, 2) for step in steps] == [1000, 937.5, 833.33, 625]
    table = training_levels(5.0)
    for step, nominal in zip(steps, (1000, 750, 500, 250), strict=True):
        assert step.level == pytest.approx(table[1000 - nominal].item(), abs=1e-12)
        assert step.timestep == pytest.approx(1000 * step.level)


def test_plain_timesteps_take_the_nearest_level_of_the_training_schedule() -> None:
    steps = RenoisingSampler(timesteps=(1000, 757, 522), shift=8.0, warp=False).schedule()
    assert [step.timestep for step in steps] == [1000, 757, 522]
    table = training_levels(8.0)
    for step in steps:
        nearest = table[(1000 * table - step.timestep).abs().argmin()].item()
        assert step.level == pytest.approx(nearest, abs=1e-12)


def test_evenly_spread_steps_are_the_usual_ones() -> None:
    assert RenoisingSampler.with_steps(4) == RenoisingSampler()
    assert RenoisingSampler.with_steps(2, shift=3.0).timesteps == (1000, 500)
    levels = [step.level for step in RenoisingSampler.with_steps(6).schedule()]
    assert levels == pytest.approx(FlowSampler(steps=6, shift=5.0).times()[:-1])


def test_the_true_flow_leads_to_the_clean_block_from_every_level() -> None:
    clean = torch.randn(SHAPE, dtype=torch.float64)
    sampler = RenoisingSampler()
    for step in sampler.schedule():
        noise = torch.randn(SHAPE, dtype=torch.float64)
        noisy = torch.lerp(clean, noise, step.level)
        assert torch.allclose(sampler.to_clean(noisy, noise - clean, step.level), clean.float(), atol=1e-6)


def test_each_step_sees_the_last_guess_under_fresh_noise_of_the_next_level() -> None:
    sampler, seen = RenoisingSampler(), []

    def predict(x: Tensor, timestep: float) -> Tensor:
        seen.append((x.clone(), timestep))
        return 0.1 * x

    drawn = sampler.draw(predict, KEY, SHAPE)
    steps = sampler.schedule()
    assert [timestep for _, timestep in seen] == [step.timestep for step in steps]
    x = draw_noise(*KEY, 0, SHAPE)
    for i, step in enumerate(steps):
        assert torch.equal(seen[i][0], x)
        clean = x - step.level * 0.1 * x
        if i + 1 < len(steps):
            level = steps[i + 1].level
            x = (1 - level) * seen_clean(seen[i][0], step.level) + level * draw_noise(*KEY, i + 1, SHAPE)
            torch.testing.assert_close(seen[i + 1][0], x)
            x = seen[i + 1][0]
    torch.testing.assert_close(drawn, clean)


def seen_clean(x: Tensor, level: float) -> Tensor:
    return x - level * 0.1 * x


def test_a_seed_decides_the_block_and_nothing_else_does() -> None:
    sampler = RenoisingSampler()

    def draw(*key: int) -> Tensor:
        torch.randn(3)
        return sampler.draw(lambda x, t: x.sin() * t / 1000, key, SHAPE)  # type: ignore[arg-type]

    assert torch.equal(draw(*KEY), draw(*KEY))
    for other in ((8, 0, 3), (7, 1, 3), (7, 0, 6)):
        assert not torch.allclose(draw(*other), draw(*KEY))


def test_history_is_clean_unless_context_noise_is_asked_for() -> None:
    clean = torch.randn(SHAPE)
    assert RenoisingSampler().context(clean, KEY) is clean
    assert RenoisingSampler().commit == (0, 0)
    sampler = RenoisingSampler(context_noise=250)
    assert sampler.commit == (250, 0.25)
    noisy = sampler.context(clean, KEY)
    torch.testing.assert_close(noisy, 0.75 * clean + 0.25 * draw_noise(*KEY, 4, SHAPE))
    assert torch.equal(noisy, sampler.context(clean, KEY))


def test_guidance_moves_away_from_the_unconditional_prediction() -> None:
    conditional, unconditional = torch.randn(2, *SHAPE).unbind()
    guided = RenoisingSampler(guidance=3.0).guide(conditional, unconditional)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional))
    torch.testing.assert_close(RenoisingSampler().guide(conditional, unconditional), conditional)


def test_it_survives_json() -> None:
    sampler = RenoisingSampler(timesteps=(1000, 400), shift=8, warp=False, context_noise=10, guidance=2)
    assert RenoisingSampler.from_dict(sampler.to_dict()) == sampler
    with pytest.raises(ConfigError, match=r"sampler: expected only the keys .* got \['steps'\]"):
        RenoisingSampler.from_dict({"steps": 4})


@pytest.mark.parametrize(
    "fields",
    [
        {"timesteps": ()},
        {"timesteps": (500, 1000)},
        {"timesteps": (1000, 1000)},
        {"timesteps": (1000, 0)},
        {"timesteps": (1001,)},
        {"timesteps": (float("nan"),)},
        {"timesteps": "1000"},
        {"timesteps": (True,)},
        {"timesteps": 4},
        {"shift": 0},
        {"shift": float("inf")},
        {"shift": "5"},
        {"warp": 1},
        {"context_noise": 1000},
        {"context_noise": -1},
        {"guidance": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ConfigError, match=f"{name}: expected"):
        RenoisingSampler(**fields)


@pytest.mark.parametrize("steps", [0, 1001, 2.0, True])
def test_impossible_step_counts_are_refused(steps: Any) -> None:
    with pytest.raises(ConfigError, match="steps: expected an int of 1 to 1000"):
        RenoisingSampler.with_steps(steps)
