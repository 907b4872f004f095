"""`avex-serve run --shard` and merge: one run is n shards merged, byte for byte."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

import avex_serve.cli
from avex_serve.archive.shards import Shard
from tests.archive.test_run import content, main_fails, make_archive

ROOT = Path(__file__).parents[2]
FORMATS = ("csv", "ndjson", "parquet", "raven", "audacity", "birdnet", "kaleidoscope", "aoef", "camtrap-dp")
EVERY_FORMAT = tuple(itertools.chain.from_iterable(("--format", name) for name in FORMATS))
OF_AN_ARRAY = {
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_MAX": "6",
    "SLURM_ARRAY_TASK_STEP": "2",
}


@pytest.fixture(autouse=True)
def on_no_cluster(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)


def run_shards(command, count, *arguments):
    return [command("run", *arguments, "--shard", f"{index}/{count}")[0] for index in range(1, count + 1)]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_one_run_is_n_shards_merged(archive, bundles, command, tmp_path, count):
    arguments = (bundles["probes"], archive, "--embeddings", "--overlap", "0.03")
    assert command("run", *arguments, "--out", tmp_path / "whole", *EVERY_FORMAT)[0] == 1
    formats = EVERY_FORMAT if count == 8 else ()  # more than there are recordings: some shards are empty
    codes = run_shards(command, count, *arguments, "--out", tmp_path / "parts", *formats)
    assert sorted(codes) == [*[0] * (count - 1), 1], "one recording is broken, in one shard"
    code, lines = command("merge", tmp_path / "parts", "--out", tmp_path / "merged", *EVERY_FORMAT)
    assert (code, lines[-1]) == (1, f"{count} shards: 5 recordings done, 1 failed")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")


@pytest.mark.nightly
@pytest.mark.parametrize("count", range(1, 9))
def test_two_hundred_recordings_in_shards(bundles, command, tmp_path, count):
    make_archive(tmp_path / "archive", 200)
    arguments = (bundles["probes"], tmp_path / "archive")
    command("run", *arguments, "--out", tmp_path / "whole", *EVERY_FORMAT)
    assert run_shards(command, count, *arguments, "--out", tmp_path / "parts") == [0] * count
    command("merge", tmp_path / "parts", "--out", tmp_path / "merged", *EVERY_FORMAT)
    assert content(tmp_path / "merged") == content(tmp_path / "whole")


def test_shards_grow_and_are_merged_again(archive, bundles, command, tmp_path, monkeypatch):
    out = ("--out", tmp_path / "parts")
    run_shards(command, 3, bundles["plain"], archive, *out)
    command("merge", tmp_path / "parts", "--out", tmp_path / "merged")
    soundfile.write(archive / "new.wav", np.random.default_rng(5).uniform(-1, 1, 4000), 16000)
    lines = [
        command("run", bundles["plain"], archive, *out, "--shard", f"{index}/3")[1][-1] for index in range(1, 4)
    ]
    assert sum(int(re.match(r"(\d+) computed", line)[1]) for line in lines) == 1, "the others stay in their shards"
    command("merge", tmp_path / "parts", "--out", tmp_path / "merged")
    command("run", bundles["plain"], archive, "--out", tmp_path / "whole")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")
    code, lines = command("run", bundles["plain"], archive, "--out", tmp_path / "merged")
    assert (code, lines[-1]) == (1, "0 computed, 6 known, 1 failed"), "it is a store as any other"


def test_shards_of_other_folders_and_another_disk(archive, bundles, command, tmp_path, monkeypatch):
    """Each shard by its folder, and copied where links can't be made."""
    run_shards(command, 2, bundles["plain"], archive, "--out", tmp_path / "parts")
    shutil.move(tmp_path / "parts" / "2-of-2", tmp_path / "from another machine")
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(18, "cross-device link")))
    folders = (tmp_path / "from another machine", tmp_path / "parts" / "1-of-2")
    assert command("merge", *folders, "--out", tmp_path / "merged")[0] == 1
    command("run", bundles["plain"], archive, "--out", tmp_path / "whole")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")


def test_every_recording_is_in_one_shard_whatever_the_list():
    paths = [f"/archive/{index:05}.wav" for index in range(2000)]
    for count in range(1, 9):
        shards = [Shard(index, count) for index in range(1, count + 1)]
        taken = [[path for path in paths if shard.holds(path)] for shard in shards]
        assert sorted(itertools.chain.from_iterable(taken)) == paths
        assert min(map(len, taken)) > 0.8 * len(paths) / count
        own = [set(shard.take(dict.fromkeys(paths[500:]))[0]) for shard in shards]
        assert all(part <= set(whole) for part, whole in zip(own, taken, strict=True))


def remove_a_shard(parts, again):
    shutil.rmtree(parts / "2-of-3")


def repeat_a_shard(parts, again):
    shutil.copytree(parts / "2-of-3", parts / "4-of-3")


def change_the_options(parts, again):
    again("2/3", "--overlap", "0.05")


def change_the_list(parts, again):
    (parts.parent / "archive" / "silent.wav").unlink()
    again("2/3")


def start_again_without_the_option(parts, again):
    again("none", "--out", str(parts / "2-of-3"))


def interrupt_a_shard(parts, again):
    result = next(result for result in parts.glob("*/scores/*/*/*.parquet"))
    result.unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove_a_shard, "of 3 shards, 2 is not there"),
        (repeat_a_shard, "are both shard 2"),
        (change_the_options, "were made by different bundles or options"),
        (change_the_list, "were made from different lists of recordings"),
        (start_again_without_the_option, "is no shard"),
        (interrupt_a_shard, "is not done"),
    ],
)
def test_what_is_not_merged(archive, bundles, command, tmp_path, capsys, harm, message):
    parts = tmp_path / "parts"
    run_shards(command, 3, bundles["plain"], archive, "--out", parts)

    def again(shard, *options):
        command("run", bundles["plain"], archive, "--out", parts, "--shard", shard, *options)

    harm(parts, again)
    assert main_fails("merge", parts, "--out", tmp_path / "merged", says=message, capsys=capsys)
    assert not (tmp_path / "merged").exists()


def test_folders_that_are_no_shards(archive, bundles, command, tmp_path, capsys):
    run_shards(command, 2, bundles["plain"], archive, "--out", tmp_path / "parts")
    parts = tmp_path / "parts"
    assert main_fails("merge", archive, "--out", tmp_path / "out", says="holds no shards", capsys=capsys)
    assert main_fails("merge", parts, "--out", parts / "1-of-2", says="is a shard itself", capsys=capsys)
    assert main_fails("status", parts, says="name one of them, or merge them", capsys=capsys)
    other = ("run", bundles["plain"], archive, "--out", parts, "--shard")
    assert main_fails(*other, "1/3", says="holds shards of 2, and this is shard 1/3", capsys=capsys)


@pytest.mark.parametrize(
    ("option", "variables", "folder"),
    [
        ("2/4", {}, "2-of-4"),
        ("none", {"SLURM_ARRAY_TASK_ID": "4", **OF_AN_ARRAY}, "."),
        ("2/4", {"SLURM_ARRAY_TASK_ID": "6", **OF_AN_ARRAY}, "2-of-4"),
        (None, {"SLURM_ARRAY_TASK_ID": "4", **OF_AN_ARRAY}, "3-of-4"),
        (None, {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "5"}, "1-of-5"),
        (None, {}, "."),
    ],
    ids=str,
)
def test_the_shard_by_option_or_environment(
    archive, bundles, tmp_path, monkeypatch, capsys, option, variables, folder
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    given = () if option is None else ("--shard", option)
    arguments = ("run", bundles["plain"], archive, "--out", tmp_path / "out", *given)
    assert avex_serve.cli.main([str(argument) for argument in arguments]) in (0, 1)
    assert (tmp_path / "out" / folder / "store.json").exists()
    assert ("avex-serve: shard" in capsys.readouterr().err) == (option is None and folder != ".")


@pytest.mark.parametrize(
    ("option", "variables", "message"),
    [
        ("0/4", {}, "says shard 0 of 4; expected 1 to 4"),
        ("5/4", {}, "says shard 5 of 4"),
        ("1/0", {}, "says shard 1 of 0"),
        ("half", {}, "--shard is 'half'; expected i/n, such as 1/8, or none"),
        (None, {"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETIONS is not; set it to the completions of the Job"),
        (None, {"JOB_COMPLETION_INDEX": "5", "JOB_COMPLETIONS": "5"}, "JOB_COMPLETION_INDEX says shard 6 of 5"),
        (None, {"SLURM_ARRAY_TASK_ID": "4"}, "SLURM_ARRAY_TASK_COUNT is ''"),
        (
            None,
            {"SLURM_ARRAY_TASK_ID": "4", **OF_AN_ARRAY, "SLURM_ARRAY_TASK_COUNT": "2"},
            "has 2 tasks from 0 to 6, so some are left out; give --shard",
        ),
    ],
    ids=str,
)
def test_shards_that_can_not_be(archive, bundles, tmp_path, monkeypatch, capsys, option, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    given = () if option is None else ("--shard", option)
    arguments = ("run", bundles["plain"], archive, "--out", tmp_path / "out", *given)
    assert main_fails(*arguments, says=message, capsys=capsys)
    assert not (tmp_path / "out").exists()


def submit(script, *arguments, **variables):
    """Run a script as Slurm does: a copy of it, with the variables of a task."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", ROOT / "deploy" / "slurm" / script, *arguments],
        env={**os.environ, **variables, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_scripts_for_slurm(archive, bundles, command, tmp_path):
    (archive / "broken.wav").unlink()
    out, options = tmp_path / "parts", ("--threshold", "0.3")
    array = {"COUNT": "2", "MIN": "1", "MAX": "2", "STEP": "1"}
    task = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    first = submit("archive.sbatch", out, bundles["plain"], archive, *options, **task, SLURM_ARRAY_TASK_ID="1")
    assert first.returncode == 0, first.stderr
    early = submit("merge.sbatch", out, tmp_path / "merged")
    assert early.returncode == 2
    assert "of 2 shards, 2 is not there" in early.stderr
    alone = {**task, "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "2"}  # sbatch --array=2
    again = (out, bundles["plain"], archive, *options)
    refused = submit("archive.sbatch", *again, **alone, SLURM_ARRAY_TASK_ID="2")
    assert refused.returncode == 2
    assert "holds shards of 2, and this is shard 1/1" in refused.stderr
    second = submit("archive.sbatch", *again, **alone, SLURM_ARRAY_TASK_ID="2", SHARDS="2")
    assert second.returncode == 0, second.stderr
    merged = submit("merge.sbatch", out, tmp_path / "merged", *options)
    assert merged.returncode == 0, merged.stderr
    command("run", bundles["plain"], archive, "--out", tmp_path / "whole", *options)
    assert content(tmp_path / "merged") == content(tmp_path / "whole")


@pytest.mark.parametrize("script", ["archive.sbatch", "merge.sbatch"])
def test_the_scripts_for_slurm_say_their_usage(script):
    done = submit(script)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch ")
    assert f"{script} OUT" in done.stderr


def test_the_job_of_kubernetes():
    job = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert variables["JOB_COMPLETIONS"] == str(job["spec"]["completions"])
    assert job["spec"]["completionMode"] == "Indexed"
    python, _, module, *arguments = [*container["command"], *container["args"]]
    assert (python, module) == ("python", "avex_serve")
    parsed = avex_serve.cli._parser().parse_args(arguments)
    mounts = [each["mountPath"] for each in container["volumeMounts"]]
    for path in (*parsed.arguments, parsed.out, variables["TMPDIR"]):
        assert any(Path(path).is_relative_to(mount) for mount in mounts), path
    rules = job["spec"]["podFailurePolicy"]["rules"]
    (codes,) = [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule]
    assert 130 not in codes, "what was interrupted starts again"
