"""Many steps in one run need no more memory than few: nothing may pile up from step to step."""

import os
from pathlib import Path

import pytest

import upstep_fast
from upstep_fast.methods.upstep.upstep import UpStep

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="reads the resident memory from /proc")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "steps",
    [300, pytest.param(20_000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])],
)
def test_memory_does_not_grow_with_the_steps(options, monkeypatch, record_property, steps):
    used, real, count = {}, UpStep.update_running_stats, iter(range(1, 10**6))

    def remember(self, embedded):
        if (step := next(count)) in (steps // 10, steps):
            used[step] = resident()
        real(self, embedded)

    monkeypatch.setattr(UpStep, "update_running_stats", remember)
    result = upstep_fast.adapt(
        **options | dict(steps=steps, batch_size=4, num_workers=1, checkpoint_every=steps // 20, report_images=False),
    )
    assert result.steps == steps and list(used) == [steps // 10, steps]
    drift = 100 * (used[steps] / used[steps // 10] - 1)
    assert drift < 1, (
        f"{used[steps // 10] / 1e6:.1f} MB after {steps // 10} steps, {used[steps] / 1e6:.1f} MB at the end"
    )
    record_property("soak_steps_max", steps)
    record_property("soak_drift_max", drift)
