"""Ranks that are gone, told from slow ones: heartbeats in a planted store."""

import pytest

from upstep_fast.runtime import distributed, heartbeat
from upstep_fast.runtime.heartbeat import Heartbeat


class Store(dict):
    """What Heartbeat uses of torch.distributed's store."""

    def set(self, key, value):
        self[key] = value.encode()

    def check(self, keys):
        return all(key in self for key in keys)

    def add(self, key, count):
        self[key] = self.get(key, 0) + count
        return self[key]


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 1))
    return now


@pytest.fixture
def watch(clock):
    store = Store()
    store.set("heartbeat/1", "3 0")
    return Heartbeat(store, 0, 2, lambda: 0, "repeat the command"), store


def test_a_rank_without_heartbeat_is_lost_and_a_slow_one_is_not(watch, clock):
    beats, store = watch
    for second in range(100):
        store.set("heartbeat/1", f"{second} 0")
        clock[0] += 1.0
        assert beats.lost(15.0) is None
    clock[0] += 14.0
    assert beats.lost(15.0) is None
    clock[0] += 2.0
    assert beats.lost(15.0) == "ranks: no heartbeat from rank 1, killed or stopped; repeat the command"


def test_a_recorded_error_is_the_cause(watch, clock):
    beats, store = watch
    store.set("cause", "1 data: gone")
    assert beats.lost(15.0) == "rank 1: data: gone"


def test_waiting_ends_when_all_are_here_or_one_is_lost(watch, clock, monkeypatch):
    beats, store = watch
    monkeypatch.setattr(distributed, "_heartbeat", beats)
    monkeypatch.setattr(distributed, "_traffic", distributed._Traffic())
    store["at/1"] = 1
    distributed.wait_for_ranks()
    began = clock[0]
    with pytest.raises(distributed.RankError, match=r"no heartbeat from rank 1, .*; repeat the command .*rank 0"):
        distributed.wait_for_ranks()
    assert 15 < clock[0] - began < 20
