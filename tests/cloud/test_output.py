"""Conversions whose output is an object store: the bytes of a directory, and nothing else left behind."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import edit_checkpoint
from support.conversions import SMALL_STEPS
from support.faulty_proxy import FaultyProxy
from support.program import PROCESS_TIMEOUT, run_cli, snapshot
from support.progress import Recorder, WhileWriting
from support.s3 import OUT, URL, objects, publish, put

import quarkconv
from quarkconv.cloud import objects as cloud_objects
from quarkconv.cloud import uploads
from quarkconv.cloud.objects import MAX_PART_BYTES, MAX_PARTS, PART_BYTES, Objects, part_size
from quarkconv.cloud.uploads import list_uploads
from quarkconv.convert.conversion import Conversion
from quarkconv.convert.options import Options
from quarkconv.errors import SourceError, UsageError, WriteError
from quarkconv.plan.shares import Share
from quarkconv.progress import SILENT
from quarkconv.write import executor
from quarkconv.write.modes import Finish
from quarkconv.write.object_destination import ObjectDestination

pytestmark = pytest.mark.long(15)

Capture = pytest.CaptureFixture[str]
OPTIONS: dict[str, Any] = {"max_shard_size": 40_000, "jobs": 2}


def convert(model: str | Path, out: str | Path = OUT, **options: Any) -> quarkconv.ConversionResult:
    return quarkconv.convert_checkpoint(model, "fused-int8", out, **{**OPTIONS, **options})


def prepare(model: str | Path, out: str | Path = OUT, **options: Any) -> Conversion:
    return Conversion.prepare(model, "fused-int8", out, Options(**{"max_shard_size": 40_000, **options}))


@pytest.fixture
def local(model: Path, tmp_path: Path) -> dict[str, str]:
    """The output as a directory has it."""
    convert(model, tmp_path / "local")
    return snapshot(tmp_path / "local")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts so small that every shard has several, of several blocks each."""
    monkeypatch.setattr(cloud_objects, "PART_BYTES", 8192)
    monkeypatch.setattr(executor, "BUFFER_BYTES", 4096)


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("from_bucket", [True, False])
def test_the_objects_have_the_bytes_of_a_directory(model: Path, local: dict[str, str], from_bucket: bool) -> None:
    result = convert(URL if from_bucket else model)
    assert result.location == OUT
    assert objects() == local
    assert list_uploads(OUT) == []
    with pytest.raises(UsageError, match="not a directory"):
        assert result.output


@pytest.mark.usefixtures("proxy", "small_parts")
@pytest.mark.parametrize("options", [{"quantize": "all"}, {"quantize": "all", "exclude": ["*.self_attn.*"]}])
def test_float_weights_are_quantized_from_bucket_to_bucket(
    model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = quarkconv.convert_checkpoint(model, "bf16", tmp_path / "bf16").output
    publish(source)
    convert(URL, **options)
    convert(source, tmp_path / "local", **options)
    assert objects() == snapshot(tmp_path / "local")


@pytest.mark.usefixtures("small_parts")
def test_shards_of_several_parts_have_the_bytes_of_a_directory(
    published: FaultyProxy, model: Path, local: dict[str, str]
) -> None:
    convert(model)
    assert objects() == local
    assert list_uploads(OUT) == []
    parts = [path for method, path in published.requests if method == "PUT" and "partNumber=" in path]
    assert len(parts) > 2 * sum(name.endswith(".safetensors") for name in local)


@pytest.mark.usefixtures("published")
def test_the_command_and_what_reads_its_output(model: Path, capsys: Capture, local: dict[str, str]) -> None:
    words: list[str | Path] = ["convert", model, "--to", "fused-int8", "--out", f"{OUT}/", "--max-shard-size", "40000"]
    code, out, _ = run_cli(capsys, *words, "--dry-run", "--json")
    assert (code, json.loads(out)["output"], objects()) == (0, OUT, {})
    code, out, _ = run_cli(capsys, *words)
    assert code == 0
    assert f"quarkconv verify {OUT}" in out
    assert objects() == local
    code, out, _ = run_cli(capsys, "inspect", OUT, "--json")
    assert (code, json.loads(out)["moe"]["layout"]) == (0, "fused")


def interrupted(model: str | Path, after: int, **options: Any) -> None:
    """A conversion that fails after some blocks."""
    calls = iter(range(10**6))

    def fail(_: int) -> None:
        if next(calls) == after:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        convert(model, progress=WhileWriting(fail), **{"jobs": 1, **options})


@pytest.mark.usefixtures("small_parts")
def test_a_failed_conversion_is_not_a_model_and_resumes(
    published: FaultyProxy, model: Path, local: dict[str, str], capsys: Capture
) -> None:
    interrupted(model, 3)
    left = objects()
    assert "config.json" not in left
    assert list_uploads(OUT) == []
    finished = [name for name in left if name.endswith(".safetensors")]
    assert finished
    code, out, _ = run_cli(capsys, "inspect", OUT, "--json")
    error = json.loads(out)
    assert (code, error["code"]) == (3, "conversion-unfinished")
    assert OUT in error["hint"]
    published.requests.clear()
    convert(model)
    assert objects() == local
    written = {
        path.split("?")[0].rpartition("/")[2] for method, path in published.requests if method in ("PUT", "POST")
    }
    assert not written & set(finished)
    assert written & {name for name in local if name.endswith(".safetensors")}


@pytest.mark.usefixtures("published")
def test_a_shard_that_was_replaced_is_written_again(model: Path, local: dict[str, str]) -> None:
    interrupted(model, 3)
    name = next(name for name in objects() if name.endswith(".safetensors"))
    size = Objects(OUT).entries()[name].size
    put(f"{OUT}/{name}", bytes(size))
    convert(model)
    assert objects() == local


@pytest.mark.usefixtures("published")
def test_another_conversion_does_not_resume(model: Path) -> None:
    interrupted(model, 3)
    before = objects()
    with pytest.raises(UsageError, match="another unfinished conversion") as caught:
        convert(model, max_shard_size=50_000)
    assert caught.value.found == "largest shard size 40000, now 50000"
    assert objects() == before
    with pytest.raises(UsageError, match="another unfinished conversion") as caught:
        quarkconv.convert_checkpoint(model, "bf16", OUT, **OPTIONS)  # its shards have other names
    assert caught.value.found == "target fused-int8, now bf16"
    assert objects() == before


@pytest.mark.usefixtures("small_parts")
def test_a_process_goes_on_with_one_shard_without_a_listing(published: FaultyProxy, local: dict[str, str]) -> None:
    conversion = prepare(URL)
    execution = conversion._execution(conversion.outputs[0], 2, SILENT)
    shard = execution.plan.shards[-1]

    def written() -> int:
        published.requests.clear()
        with execution.opened() as sources, execution.rejoined(sources, shard) as run, run.writing():
            run.write_shards((shard,), 2)
        assert not [path for method, path in published.requests if method == "GET" and "list-type" in path]
        return sum(method == "PUT" and shard.file in path for method, path in published.requests)

    with pytest.raises(UsageError, match="Another process has finished"):
        written()
    with execution.opened() as sources, execution.joined(sources):
        pass
    assert written() > 2
    assert written() == 0
    put(f"{OUT}/{shard.file}", b"another object")
    assert written() > 2
    assert shard.file in objects()
    conversion.carry_out()
    assert objects() == local


KILLED = (
    SMALL_STEPS.replace("2**20,", "2**14,").replace("2**18", "2**14")
    + """
import quarkconv.cloud.objects
quarkconv.cloud.objects.PART_BYTES = 2**14
main(sys.argv[1:])
"""
)


def test_a_conversion_that_is_killed_resumes_and_leaves_nothing(published: FaultyProxy, local: dict[str, str]) -> None:
    words = ["convert", URL, "--to", "fused-int8", "--out", OUT, "--max-shard-size", "40000", "--jobs", "2"]
    rng, killed = random.Random(1), 0
    published.slow = 0.02
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", KILLED, *words], stderr=subprocess.PIPE)
        if attempt < 7:
            try:
                process.wait(rng.uniform(0.6, 1.6))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
        errors = process.communicate(timeout=PROCESS_TIMEOUT)[1].decode()
        if "config.json" in objects() and not any(name.startswith(".quarkconv/plan") for name in objects()):
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert killed > 1
    assert {name: found for name, found in objects().items() if not name.startswith(".quarkconv/notes")} == local
    assert list_uploads(OUT) == []


def test_uploads_of_a_dead_run_are_listed_and_discarded(
    published: FaultyProxy, model: Path, capsys: Capture, local: dict[str, str]
) -> None:
    import boto3

    def leave(name: str) -> None:
        client, key = boto3.client("s3", region_name="us-east-1"), f"out/tiny-moe/{name}"
        upload = client.create_multipart_upload(Bucket="models", Key=key)["UploadId"]
        client.upload_part(Bucket="models", Key=key, UploadId=upload, PartNumber=1, Body=bytes(10_000))

    shard = next(name for name in local if name.endswith(".safetensors"))
    leave(shard)
    leave("other.bin")
    code, out, _ = run_cli(capsys, "uploads", OUT, "--json")
    value = json.loads(out)
    assert (code, value["schema"], value["aborted"]) == (0, "quarkconv.uploads/1", False)
    assert [item["name"] for item in value["uploads"]] == [shard, "other.bin"]
    assert [item["nbytes"] for item in value["uploads"]] == [10_000, 10_000]
    convert(model)  # discards those of its own shards alone
    assert [upload.name for upload in list_uploads(OUT)] == ["other.bin"]
    code, out, _ = run_cli(capsys, "uploads", OUT, "--abort")
    assert code == 0
    assert "other.bin" in out
    assert run_cli(capsys, "uploads", OUT)[1] == "No unfinished uploads.\n"
    published.deny = ("GET",)
    code, out, _ = run_cli(capsys, "uploads", OUT, "--json")
    assert (code, "ListBucketMultipartUploads" in json.loads(out)["hint"]) == (5, True)
    assert run_cli(capsys, "uploads", "gs://bucket/path")[0] == 4


@pytest.mark.usefixtures("published")
def test_an_upload_that_ends_while_uploads_are_listed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    client = boto3.client("s3")
    keys = [f"out/tiny-moe/{name}" for name in ("first", "second")]
    started = [client.create_multipart_upload(Bucket="models", Key=key)["UploadId"] for key in keys]
    original = uploads._parts_nbytes

    def end_first(client: Any, bucket: str, upload: dict[str, Any]) -> int | None:
        if upload["UploadId"] == started[0]:
            client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=started[0])
        return original(client, bucket, upload)

    monkeypatch.setattr(uploads, "_parts_nbytes", end_first)
    assert [(upload.name, upload.nbytes) for upload in list_uploads(OUT)] == [("second", 0)]


@pytest.mark.usefixtures("published")
def test_a_scale_that_is_nan_leaves_no_model(model: Path) -> None:
    name = "model.layers.0.mlp.experts.2.up_proj.weight_scale"
    edit_checkpoint(model, lambda tensors: tensors[name][5:6].fill_(float("nan")))
    publish(model)
    with pytest.raises(SourceError, match="A scale is NaN or infinite") as caught:
        convert(URL)
    assert caught.value.tensor == name
    assert objects() == {}


def test_other_objects_are_refused_and_left_alone(model: Path, local: dict[str, str]) -> None:
    put(f"{OUT}/notes.txt", b"mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="other objects") as caught:
            convert(model, overwrite=overwrite)
        assert caught.value.found == "notes.txt"
        assert list(objects()) == ["notes.txt"]
    Objects(OUT).delete(["notes.txt"])
    convert(model)
    with pytest.raises(UsageError, match="other objects") as caught:
        convert(model)
    assert caught.value.hint == "replace the earlier conversion with --overwrite"
    put(f"{OUT}/deep/notes.txt", b"mine")
    with pytest.raises(UsageError, match="other objects"):
        convert(model, overwrite=True)
    assert objects().keys() == {*local, "deep/notes.txt"}


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("finished", [True, False])
def test_overwrite_replaces_an_earlier_conversion(model: Path, local: dict[str, str], finished: bool) -> None:
    if finished:
        convert(model, max_shard_size=20_000)
    else:
        interrupted(model, 3, max_shard_size=20_000)
    put("s3://models/out/tiny-moe-2/notes.txt", b"mine")
    convert(model, overwrite=True)
    assert objects() == local
    assert list(objects("s3://models/out/tiny-moe-2")) == ["notes.txt"]


def test_without_permission_no_byte_of_a_shard_is_sent(published: FaultyProxy, model: Path, capsys: Capture) -> None:
    published.deny = ("PUT", "POST")
    code, out, _ = run_cli(capsys, "convert", model, "--to", "fused-int8", "--out", OUT, "--json")
    error = json.loads(out)
    assert (code, error["error"]) == (5, "The object store refuses access")
    assert "AWS_ACCESS_KEY_ID" in error["hint"]
    assert {path for method, path in published.requests if method in ("PUT", "POST") and "out/" in path} == {
        "/models/out/tiny-moe/.quarkconv/plan.json"
    }


def test_a_clock_that_is_wrong_is_named(published: FaultyProxy, model: Path, capsys: Capture) -> None:
    published.deny, published.deny_code = ("PUT", "POST", "GET"), "RequestTimeTooSkewed"
    for words, expected in ((["convert", model, "--to", "fused-int8", "--out", OUT], 5), (["inspect", URL], 3)):
        code, out, _ = run_cli(capsys, *words, "--json")
        error = json.loads(out)
        assert (code, error["hint"].partition(";")[0]) == (expected, "set the clock")
        assert "RequestTimeTooSkewed" in error["found"]


@pytest.mark.usefixtures("published")
def test_a_bucket_that_does_not_exist_is_named(model: Path, capsys: Capture) -> None:
    code, out, _ = run_cli(capsys, "convert", model, "--to", "fused-int8", "--out", "s3://nothing/here", "--json")
    assert (code, json.loads(out)["error"]) == (5, "The bucket does not exist")


@pytest.mark.usefixtures("published")
def test_missing_credentials_are_named_without_waiting(
    model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    words: list[str | Path] = ["convert", model, "--to", "fused-int8", "--out", OUT]
    code, out, _ = run_cli(capsys, *words, "--json")
    error = json.loads(out)
    assert (code, error["error"]) == (2, "There are no credentials for the object store")
    assert "AWS_SKIP_SIGNATURE" in error["hint"]
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert "team" in json.loads(run_cli(capsys, *words, "--json")[1])["found"]
    (tmp_path / "credentials").write_text("[team]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    assert run_cli(capsys, *words)[0] == 0


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("out", "options"), [("s3://models", {}), (f"{URL}/inside", {}), ("s3://models/org", {}), (OUT, {"tp": 2, "ep": 2})]
)
def test_outputs_that_cannot_be_are_wrong_usage(out: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        convert(URL, out, **options)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("fault", "status"), [("refuse_puts", 503), ("refuse_puts", 429), ("refuse_puts", 500), ("reset_puts", 0)]
)
def test_uploads_that_fail_are_tried_again(
    published: FaultyProxy, model: Path, local: dict[str, str], fault: str, status: int
) -> None:
    published.status = status
    setattr(published, fault, 4)
    convert(model)
    assert getattr(published, fault) == 0
    assert objects() == local
    assert list_uploads(OUT) == []


@pytest.mark.usefixtures("small_parts")
def test_credentials_that_expire_meanwhile_end_the_run_which_then_resumes(
    published: FaultyProxy, model: Path, local: dict[str, str]
) -> None:
    calls = iter(range(10**6))

    def expire(_: int) -> None:
        if next(calls) == 3:
            published.deny = ("PUT", "POST")

    with pytest.raises(WriteError, match="refuses access") as caught:
        convert(model, progress=WhileWriting(expire), jobs=1)
    assert "resumes" in (caught.value.hint or "")
    published.deny = ()
    assert "config.json" not in objects()
    convert(model)
    assert objects() == local
    assert list_uploads(OUT) == []


@pytest.mark.usefixtures("published")
def test_a_source_that_is_replaced_leaves_no_model(model: Path) -> None:

    calls = iter(range(10**6))

    def replace(_: int) -> None:
        if next(calls) == 1:
            for path in model.glob("*.safetensors"):
                data = bytearray(path.read_bytes())
                data[-1] ^= 1
                path.write_bytes(data)
            publish(model)

    with pytest.raises(SourceError, match="differs from the one that was listed"):
        convert(URL, progress=WhileWriting(replace), jobs=1)
    assert "config.json" not in objects()
    assert list_uploads(OUT) == []


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("at_once", [True, False])
def test_parts_give_the_objects_of_one_process(model: Path, local: dict[str, str], at_once: bool) -> None:
    def run(number: int) -> object:
        return prepare(model).carry_out(Share(number, 3)).result

    if at_once:
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(run, range(1, 4)))
        assert any(result is not None for result in results)
    else:
        assert [run(number) is None for number in (3, 1)] == [True, True]
        with pytest.raises(WriteError, match="missing") as caught:
            prepare(model).carry_out(Finish())
        assert caught.value.hint == "run --part 2/3 again"
        assert run(2) is not None
        assert run(2) is not None  # of a finished conversion
    assert objects() == local


def test_only_the_part_that_finishes_reads_notes_and_no_source_is_checked_twice(
    published: FaultyProxy, local: dict[str, str]
) -> None:
    shards = sum(name.endswith(".safetensors") for name in local)
    for number, expected in ((1, 0), (2, 0), (3, shards)):
        published.requests.clear()
        progress = Recorder()
        prepare(URL).carry_out(Share(number, 3), jobs=2, progress=progress)
        assert sum(method == "GET" and "/notes/" in path for method, path in published.requests) == expected
        assert not [path for method, path in published.requests if method == "HEAD" and "/org/tiny-moe/" in path]
        [step] = progress.named(f"Converting part {number}/3 to fused-int8")
        assert sum(step.advances) == step.total
    assert objects() == local


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("owner", "method"), [(Objects, "get_many"), (ObjectDestination, "publish")])
def test_a_last_part_that_another_process_overtakes_sees_the_conversion_finished(
    model: Path, local: dict[str, str], monkeypatch: pytest.MonkeyPatch, owner: Any, method: str
) -> None:
    """The other one finishes before the notes of all shards are read here, or before the manifest is written here."""
    prepare(model).carry_out(Share(1, 2))
    shards = {name for name in local if name.endswith(".safetensors")}
    original = getattr(owner, method)
    overtaken: list[bool] = []

    def overtake(*arguments: Any) -> Any:
        if not overtaken and shards <= objects().keys():
            overtaken.append(True)
            assert prepare(model).carry_out(Finish()).result is not None
        return original(*arguments)

    monkeypatch.setattr(owner, method, overtake)
    assert prepare(model).carry_out(Share(2, 2)).result is not None
    assert overtaken
    assert objects() == local


@pytest.mark.usefixtures("published")
def test_finish_without_a_conversion_and_parts_of_another_are_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="no unfinished conversion"):
        prepare(model).carry_out(Finish())
    prepare(model).carry_out(Share(1, 3))
    with pytest.raises(UsageError, match="another unfinished conversion") as caught:
        prepare(model).carry_out(Share(1, 4))
    assert caught.value.found == "number of parts 3, now 4"
    with pytest.raises(UsageError) as caught:
        prepare(model, max_shard_size=50_000).carry_out(Share(2, 3))
    assert caught.value.found == "largest shard size 40000, now 50000"


def test_the_size_of_parts_keeps_to_the_limits() -> None:
    assert part_size(0) == part_size(5 * 10**9) == PART_BYTES
    for nbytes in (PART_BYTES * MAX_PARTS, PART_BYTES * MAX_PARTS + 1, 10**12, 5 * 2**40, MAX_PARTS * MAX_PART_BYTES):
        size = part_size(nbytes)
        assert -(-nbytes // size) <= MAX_PARTS
        assert PART_BYTES <= size <= MAX_PART_BYTES
        assert size % 2**20 == 0
    with pytest.raises(UsageError, match="cannot hold a shard"):
        part_size(MAX_PARTS * MAX_PART_BYTES + 1)
