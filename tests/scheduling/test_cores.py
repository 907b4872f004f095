"""Cores as control groups allow them, laid out in a folder as the kernel lays them out."""

import os

import pytest

from avex_serve.scheduling.cores import threads_of_worker, usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def cores(folder, membership, **files):
    for path, text in files.items():
        file = folder / "cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "self").write_text(membership)
    return usable_cores(folder / "cgroup", folder / "self")


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("1600000 100000", 8)],
)
def test_version_2(tmp_path, quota, expected):
    assert cores(tmp_path, "0::/a/b\n", **{"a/b/cpu.max": quota + "\n"}) == expected


def test_the_tightest_of_a_group_and_those_above_counts(tmp_path):
    files = {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000", "cpu.max": "max 100000"}
    assert cores(tmp_path, "0::/a/b\n", **files) == 3


def test_container_whose_group_is_mounted_as_the_root(tmp_path):
    assert cores(tmp_path, "0::/kubepods/pod1/c\n", **{"cpu.max": "200000 100000"}) == 2


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("250000", 3)])
@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_version_1(tmp_path, quota, expected, mount):
    files = {f"{mount}/docker/c/cpu.cfs_quota_us": f"{quota}\n", f"{mount}/docker/c/cpu.cfs_period_us": "100000\n"}
    assert cores(tmp_path, "5:memory:/docker/c\n4:cpu,cpuacct:/docker/c\n", **files) == expected


def test_no_control_groups(tmp_path):
    assert usable_cores(tmp_path / "cgroup", tmp_path / "self") == 8


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr("avex_serve.scheduling.cores.usable_cores", lambda: 8)
    assert [threads_of_worker(workers) for workers in (1, 2, 3, 16)] == [8, 4, 2, 1]
