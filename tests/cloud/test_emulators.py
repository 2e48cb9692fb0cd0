"""Azure's and Google's object stores, as their emulators have them. Run by ``make test-emulators``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.emulators import AZURITE, FAKE_GCS_SERVER, azurite, fake_gcs_server
from support.program import snapshot
from support.s3 import objects, publish

import quarkconv
from quarkconv.cloud.bucket import open_bucket
from quarkconv.cloud.objects import Objects
from quarkconv.convert.conversion import Conversion
from quarkconv.convert.options import Options
from quarkconv.errors import SourceError
from quarkconv.write.leases import Leases
from quarkconv.write.modes import Join
from quarkconv.write.object_leases import ObjectLeases

needs_azurite = pytest.mark.skipif(not AZURITE, reason="no Azurite: make test-emulators installs it")
needs_fake_gcs = pytest.mark.skipif(not FAKE_GCS_SERVER, reason="no fake-gcs-server: make test-emulators installs it")
AZURE_URL, AZURE_OUT = "az://models/org/tiny-moe", "az://models/out/tiny-moe"
GOOGLE_URL = "gs://models/org/tiny-moe"


@pytest.fixture
def local(model: Path, tmp_path: Path) -> dict[str, str]:
    """The output as a directory has it."""
    out = tmp_path / "local"
    return snapshot(quarkconv.convert_checkpoint(model, "fused-int8", out, max_shard_size=40_000).output)


@pytest.fixture
def azure(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Azurite with the model."""
    with azurite() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        publish(model, AZURE_URL)
        yield


@needs_azurite
@pytest.mark.usefixtures("azure")
def test_azure_holds_the_bytes_of_a_directory_and_they_are_verified_there(local: dict[str, str]) -> None:
    quarkconv.convert_checkpoint(AZURE_URL, "fused-int8", AZURE_OUT, max_shard_size=40_000)
    assert objects(AZURE_OUT) == local
    verified = quarkconv.verify_checkpoint(AZURE_OUT, AZURE_URL, "cpu", tokens=4)
    assert verified.ok
    assert verified.bytes.against_source


@needs_azurite
@pytest.mark.usefixtures("azure")
def test_workers_take_leases_on_azure(local: dict[str, str]) -> None:
    first, second = (Leases(ObjectLeases(Objects(AZURE_OUT))) for _ in range(2))
    assert (first.take("shard"), second.take("shard")) == (True, False)
    first.release("shard")
    conversion = Conversion.prepare(AZURE_URL, "fused-int8", AZURE_OUT, Options(max_shard_size=40_000))
    conversion.carry_out(Join(), jobs=2)
    assert objects(AZURE_OUT) == local


@needs_azurite
@pytest.mark.usefixtures("azure")
def test_an_object_on_azure_that_is_replaced_is_noticed(model: Path) -> None:
    files = open_bucket(AZURE_URL)
    names = [name for name in files.entries if name.endswith(".safetensors")]
    files.check_unchanged(names)
    publish(model, AZURE_URL)
    with pytest.raises(SourceError, match="has changed since it was listed"):
        files.check_unchanged(names)


@needs_fake_gcs
def test_models_on_google_are_read(
    model: Path, tmp_path: Path, local: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_gcs_server(model, "org/tiny-moe") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert quarkconv.inspect_checkpoint(GOOGLE_URL).ok
        out = quarkconv.convert_checkpoint(GOOGLE_URL, "fused-int8", tmp_path / "out", max_shard_size=40_000).output
        assert snapshot(out) == local
        assert quarkconv.verify_checkpoint(out, GOOGLE_URL, "cpu", stages=["bytes"]).bytes.against_source
