"""`avex-serve run --engine ray` on a local cluster."""

import os
import sys

import pytest

from tests.archive.test_run import content, main_fails

pytestmark = pytest.mark.slow


@pytest.fixture
def ray(monkeypatch, tmp_path_factory):
    pytest.importorskip("ray", reason="pip install 'avex-serve[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


def test_ray_gives_the_bytes_of_one_process(archive, bundles, command, tmp_path, ray):
    arguments = (bundles["probes"], bundles["head"], archive, "--embeddings", "--format", "csv", "--format", "raven")
    command("run", *arguments, "--out", tmp_path / "whole")
    code, lines = command("run", *arguments, "--out", tmp_path / "ray", "--engine", "ray")
    assert (code, lines[-1]) == (1, "5 computed, 0 known, 1 failed")
    assert content(tmp_path / "ray") == content(tmp_path / "whole")
    code, lines = command("run", *arguments, "--out", tmp_path / "ray", "--engine", "ray")
    assert (code, lines[-1]) == (1, "0 computed, 5 known, 1 failed")


def test_a_probe_added_later_needs_no_cluster_for_stored_embeddings(archive, bundles, command, tmp_path, ray):
    (archive / "broken.wav").unlink()
    options = ("--embeddings", "--out", tmp_path / "out")
    command("run", bundles["probes"], archive, *options)
    code, lines = command("run", bundles["probes"], bundles["head"], archive, *options, "--engine", "ray")
    assert (code, lines[-1]) == (0, "5 computed, 0 known, 0 failed")
    command("run", bundles["probes"], bundles["head"], archive, "--embeddings", "--out", tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_without_ray(archive, bundles, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ("run", bundles["plain"], archive, "--out", tmp_path / "out", "--engine", "ray")
    assert not main_fails(*arguments, says="pip install 'avex-serve[ray]'", capsys=capsys)
