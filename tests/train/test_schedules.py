"""Schedules: the reference's golden values, both ends of every schedule, and the frozen last layer."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dinov2.recipes import vitg14, vitl16_short
from dinov2.train.optimization import CosineSchedule, Schedules


def test_golden_values() -> None:
    schedule = CosineSchedule(base=1, final=0, steps=10, warmup_steps=4)
    expected = [0, 1 / 3, 2 / 3, 1, 1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]
    assert [schedule(step) for step in range(10)] == pytest.approx(expected, abs=1e-7)


def test_after_the_end_the_final_value_stays() -> None:
    schedule = CosineSchedule(base=1, final=0.25, steps=10, warmup_steps=4)
    assert [schedule(10), schedule(1000)] == [0.25, 0.25]


def test_warmup_of_one_step_uses_its_start() -> None:
    schedule = CosineSchedule(base=1, final=0, steps=3, warmup_steps=1, start=0.5)
    assert [schedule(0), schedule(1)] == [0.5, 1]


def test_without_warmup_the_first_step_has_the_base_value() -> None:
    assert CosineSchedule(base=0.04, final=0.4, steps=5)(0) == pytest.approx(0.04)


def test_warmup_as_long_as_the_run() -> None:
    schedule = CosineSchedule(base=0.07, final=0.07, steps=4, warmup_steps=4, start=0.04)
    assert [schedule(step) for step in range(5)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])


def test_vitl16_short_at_its_landmarks() -> None:
    config = vitl16_short()
    schedules = Schedules(config)
    peak = 4e-3 * math.sqrt(2048 / 1024)
    assert schedules(0).lr == 0
    assert schedules(12_499).lr == schedules(12_500).lr == pytest.approx(peak) == pytest.approx(5.66e-3, rel=1e-3)
    assert schedules(config.steps - 1).lr == pytest.approx(1e-6, rel=1e-3)
    assert schedules(0).weight_decay == pytest.approx(0.04)
    assert schedules(config.steps).weight_decay == 0.4
    assert schedules(0).teacher_momentum == pytest.approx(0.992)
    assert schedules(config.steps).teacher_momentum == 1.0
    assert schedules(0).teacher_temperature == 0.04
    assert schedules(37_499).teacher_temperature == schedules(80_000).teacher_temperature == pytest.approx(0.07)
    assert schedules(18_750).teacher_temperature == pytest.approx(0.055, abs=1e-6)
    assert [schedules(step).last_layer_lr == 0 for step in (0, 1, 1249, 1250)] == [True, True, True, False]


def test_vitg14_phases_in_steps() -> None:
    schedules = Schedules(vitg14())
    assert schedules.lr.warmup_steps == 100_000
    assert schedules.temperature.warmup_steps == 37_500
    assert schedules.frozen_steps == 1250


def test_all_schedules_stretch_with_the_run() -> None:
    config = vitl16_short()
    short = Schedules(dataclasses.replace(config, steps=1250))
    assert (short.lr.warmup_steps, short.temperature.warmup_steps, short.frozen_steps) == (125, 375, 12)
