"""The machine as a process sees it: memory and processors within a container's limits, on any operating system."""

import os

import psutil
import pytest

from sanrt.runtime import host

GIB = 2**30


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """`cgroup(own, {file: text})` makes this process a member of control groups with these files."""

    def make(own, files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        (tmp_path / "self").write_text(own)
        monkeypatch.setattr(host, "CGROUPS", tmp_path)
        monkeypatch.setattr(host, "OWN_CGROUP", tmp_path / "self")

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB}))
    return make


def memory_v2(folder, limit, used, cached):
    stat = f"anon {used - cached}\nfile {cached}\nactive_file {cached // 2}\ninactive_file {cached - cached // 2}\n"
    return {f"{folder}memory.max": limit, f"{folder}memory.current": f"{used}\n", f"{folder}memory.stat": stat}


def test_cached_files_do_not_count_as_used_in_a_container(cgroup):
    cgroup("0::/\n", memory_v2("", f"{8 * GIB}\n", 7 * GIB + GIB // 2, 7 * GIB))
    assert host.free_host_memory() == 7 * GIB + GIB // 2


def test_they_do_not_in_cgroups_of_version_1_either(cgroup):
    stat = f"cache {7 * GIB}\ninactive_file 5\ntotal_inactive_file {4 * GIB}\ntotal_active_file {3 * GIB}\n"
    limits = {"memory.limit_in_bytes": f"{8 * GIB}", "memory.usage_in_bytes": f"{7 * GIB + GIB // 2}", "memory.stat": stat}
    cgroup("5:cpu,cpuacct:/\n4:memory:/docker/0123\n", {f"memory/{name}": text for name, text in limits.items()})
    assert host.free_host_memory() == 7 * GIB + GIB // 2


def test_the_narrowest_group_above_the_process_counts(cgroup):
    files = memory_v2("a/b/", "max\n", GIB, 0) | memory_v2("a/", f"{4 * GIB}\n", GIB, 0) | memory_v2("", "max\n", GIB, 0)
    cgroup("0::/a/b\n", files)
    assert host.free_host_memory() == 3 * GIB


def test_without_a_limit_the_machines_memory_counts(cgroup):
    cgroup("0::/\n", {})
    assert host.free_host_memory() == 64 * GIB


@pytest.mark.parametrize(("quota", "expected"), [("200000 100000", 2), ("150000 100000", 2), ("max 100000", 64)])
def test_a_containers_share_of_the_processors_limits_the_threads(cgroup, monkeypatch, quota, expected):
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: list(range(64)), raising=False)
    cgroup("0::/\n", {"cpu.max": quota})
    assert host.cores() == expected


def test_memory_and_processors_are_told_where_there_is_nothing_of_linux(monkeypatch, tmp_path):
    for name in ("CPUINFO", "CGROUPS", "OWN_CGROUP"):
        monkeypatch.setattr(host, name, tmp_path / "missing")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.delattr(psutil.Process, "cpu_affinity", raising=False)
    assert host.cores() >= 1
    assert host.free_host_memory() > 0
    assert host.cpu_name()
    with (tmp_path / "scratch").open("wb") as file:
        host.reserve(file.fileno(), 1000)
    assert (tmp_path / "scratch").stat().st_size == 1000


def test_the_architecture_is_asked_before_the_flags_as_an_emulator_shows_those_of_the_machine_below(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("model name : An x86\nflags : sse2 avx2 avx512f avx512_vnni\n")
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(host.platform, "processor", lambda: "")
    assert (host.cpu_features(), host.cpu_name()) == ((), "aarch64")
    monkeypatch.setattr(host.platform, "machine", lambda: "AMD64")
    assert (host.cpu_features(), host.cpu_name()) == (("AVX2", "AVX-512", "AVX512-VNNI"), "An x86")
