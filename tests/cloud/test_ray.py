"""``--ray``: conversions and verifications on several nodes of one machine. Run by ``make test-cloud``."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import edit_checkpoint, make_checkpoint
from support.program import PROCESS_TIMEOUT, run_cli, snapshot
from support.s3 import names, objects, publish

import quarkconv
from quarkconv.cli.options import with_addresses
from quarkconv.cloud.objects import PART_BYTES
from quarkconv.cloud.uploads import list_uploads
from quarkconv.errors import HubError, QuarkconvError, SourceError, UnsupportedError, UsageError

Capture = pytest.CaptureFixture[str]
SHARD_SIZE = 30_000
NOTES = ".quarkconv/notes/*"
RUNS = int(os.environ.get("RAY_RUNS", "3"))
"""Runs with nodes or drivers killed; ``make test-cloud`` runs 20."""


@pytest.mark.parametrize(
    ("words", "filled"),
    [
        (["convert", "--ray"], ["convert", "--ray", "auto"]),
        (["convert", "--ray", "--to", "bf16"], ["convert", "--ray", "auto", "--to", "bf16"]),
        (["--ray", "10.0.0.1:6379", "m"], ["--ray", "10.0.0.1:6379", "m"]),
        (["--ray", "ray://head:10001"], ["--ray", "ray://head:10001"]),
        (["--ray", "local"], ["--ray", "local"]),
        (["--ray", "./model"], ["--ray", "auto", "./model"]),
        (["inspect", "m"], ["inspect", "m"]),
    ],
)
def test_the_address_may_be_left_out(words: list[str], filled: list[str]) -> None:
    assert with_addresses(words) == filled


@pytest.mark.parametrize(
    "error",
    [
        UsageError("m", hint="h"),
        SourceError("m", code="shard-missing", file="f"),
        HubError("m", found="x"),
        UnsupportedError("m", tensor="t"),
    ],
)
def test_errors_cross_processes_with_all_their_parts(error: QuarkconvError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_without_ray_the_package_is_named(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    model = make_checkpoint(tmp_path / "model")
    code, out, _ = run_cli(capsys, "convert", model, "--to", "fused-int8", "--ray", "--json")
    assert (code, json.loads(out)["hint"]) == (2, "pip install ray")
    code, out, _ = run_cli(capsys, "verify", model, "--ray", "--json")
    assert (code, json.loads(out)["hint"]) == (2, "pip install ray")
    assert run_cli(capsys, "convert", model, "--to", "fused-int8", "--ray", "--join")[0] == 2


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A head without CPUs, and two nodes with access to the S3 server."""
    pytest.importorskip("ray", reason="Ray is not installed: make test-cloud installs it")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.access = {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": request.getfixturevalue("server"), "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    for _ in range(2):
        cluster.add_node(num_cpus=1, env_vars=cluster.access)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    return make_checkpoint(
        folder / "model", layers=4, experts=8, hidden=128, intermediate=128, zero_points=True, shards=2
    )


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return snapshot(quarkconv.convert_checkpoint(model, "fused-int8", out, max_shard_size=SHARD_SIZE).output)


def words(model: Path | str, out: Path | str, address: str, shard_size: int = SHARD_SIZE) -> list[str]:
    sizes = ["--max-shard-size", str(shard_size), "--ray", address]
    return ["convert", str(model), "--to", "fused-int8", "--out", str(out), *sizes]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    code = "import sys; from quarkconv.cli.main import main; main(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_conversion_has_the_bytes_of_one_machine(
    cluster: Any, model: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    process = start(*words(model, tmp_path / "out", cluster.address), "--json")
    out, errors = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 0, errors.decode()
    assert json.loads(out)["bytes"] > 0
    assert snapshot(tmp_path / "out") == whole


def test_a_verification_is_that_of_one_machine(cluster: Any, model: Path, tmp_path: Path) -> None:
    out = quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "out", max_shard_size=SHARD_SIZE).output
    options = ["verify", str(out), "--source", str(model), "--tokens", "4", "--device", "cpu", "--json"]
    process = start(*options, "--ray", cluster.address)
    found, errors = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 0, errors.decode()
    alone = start(*options)
    expected = json.loads(alone.communicate(timeout=PROCESS_TIMEOUT)[0])
    value = json.loads(found)
    for item in (value, expected):
        for layer in item["numbers"]["layers"]:
            del layer["seconds"]
    for item in (value, expected):
        del item["model"], item["source"]
    assert value == expected


def test_a_check_that_fails_on_a_node_ends_the_command_with_its_error(cluster: Any, tmp_path: Path) -> None:
    broken = make_checkpoint(tmp_path / "model", experts=4, zero_points=True)
    check = quarkconv.plan_conversion(broken, "fused-int8").checks[0].first
    with open(broken / check.file, "r+b") as file:
        file.seek(check.start)
        file.write(b"\x01")
    process = start(*words(broken, tmp_path / "out", cluster.address), "--json")
    out, _ = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 4
    assert json.loads(out)["tensor"] == check.tensor
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_scale_that_is_nan_ends_the_command_with_its_error(cluster: Any, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.2.up_proj.weight_scale"
    broken = make_checkpoint(tmp_path / "model", experts=4)
    edit_checkpoint(broken, lambda tensors: tensors[name][1:2].fill_(float("nan")))
    process = start(*words(broken, tmp_path / "out", cluster.address), "--json")
    out, _ = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 3
    assert json.loads(out)["tensor"] == name
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("seed", range(RUNS))
def test_nodes_and_drivers_that_are_killed_cost_time_only(
    cluster: Any, model: Path, tmp_path: Path, whole: dict[str, str], seed: int
) -> None:
    out = tmp_path / "out"
    convert_with_kills(
        cluster,
        random.Random(seed),
        words(model, out, cluster.address),
        notes=lambda: len(list(out.glob(NOTES))),
        is_finished=lambda: (out / "config.json").exists(),
    )
    assert snapshot(out) == whole


def convert_with_kills(
    cluster: Any, rng: random.Random, command: list[str], notes: Callable[[], int], is_finished: Callable[[], bool]
) -> None:
    """Run a conversion until it is finished, and kill a node or the driver while tasks work, three times at most.

    Args:
        cluster: the cluster.
        rng: decides what is killed, and when.
        command: the conversion.
        notes: returns the number of finished shards.
        is_finished: whether the conversion is.
    """
    killed = 0
    for attempt in range(6):
        process = start(*command)
        victim = rng.choice(["node", "driver"]) if attempt < 3 else "none"
        before = notes()
        while victim != "none" and process.poll() is None and notes() == before:
            time.sleep(0.02)  # until a task has written a shard
        time.sleep(rng.uniform(0, 0.5) if victim != "none" else 0)
        killed += victim != "none" and process.poll() is None
        if victim == "driver":
            process.send_signal(signal.SIGKILL)
        elif victim == "node" and process.poll() is None:
            node = rng.choice(list(cluster.worker_nodes))
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1, env_vars=cluster.access)
        errors = process.communicate(timeout=PROCESS_TIMEOUT)[1].decode()
        if is_finished():
            break
        assert victim == "driver", errors
    assert killed


@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize("seed", range(100, 100 + RUNS))
def test_nodes_and_drivers_that_are_killed_leave_no_upload_in_an_object_store(
    cluster: Any, tmp_path: Path, seed: int
) -> None:
    """Shards have several parts of 5 MiB, so that a task is killed between two of them."""
    big = make_checkpoint(tmp_path / "model", layers=3, experts=8, hidden=512, intermediate=1024, shards=2)
    source, out, size = "s3://models/org/big", f"s3://models/out/{seed}", 8_000_000
    publish(big, source)
    local = snapshot(quarkconv.convert_checkpoint(big, "fused-int8", tmp_path / "out", max_shard_size=size).output)
    assert max(path.stat().st_size for path in (tmp_path / "out").iterdir()) > PART_BYTES
    convert_with_kills(
        cluster,
        random.Random(seed),
        words(source, out, cluster.address, size),
        notes=lambda: sum(name.startswith(".quarkconv/notes/") for name in names(out)),
        is_finished=lambda: "config.json" in (found := names(out)) and ".quarkconv/plan.json" not in found,
    )
    assert {name: found for name, found in objects(out).items() if not name.startswith(".quarkconv/")} == local
    assert list_uploads(out) == []
