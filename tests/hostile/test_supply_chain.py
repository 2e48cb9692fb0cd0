"""Nothing of a checkpoint is run, nothing is sent anywhere, and nothing is read that can carry code."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.model import Model
from support.moe_model import INDEX
from support.program import snapshot
from support.raw import write_json

pytestmark = pytest.mark.long(10)

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*sorted((ROOT / "quarkconv").rglob("*.py")), *sorted((ROOT / "kernels" / "src").rglob("*.py"))]

NO_NETWORK = """
import os, sys

def forbid(event, arguments):
    harmless = event == "socket.gethostname" or (event == "socket.__new__" and arguments[1] == 1)  # AF_UNIX
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")) and not harmless:
        print(f"network: {event} {arguments}", file=sys.stderr, flush=True)
        os._exit(99)

sys.addaudithook(forbid)
from quarkconv.cli.main import run
run()
"""
"""The program, with every use of the network being its end."""


def offline(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", NO_NETWORK, *map(str, arguments)]
    environment = {**os.environ, "HOME": str(cwd), "HF_HOME": str(cwd / "hf")}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


def test_the_hook_notices_the_network(tmp_path: Path) -> None:
    done = offline("inspect", "org/name", cwd=tmp_path)
    assert done.returncode == 99
    assert "network: socket." in done.stderr


def test_no_command_uses_the_network_for_a_path(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", hidden=16, intermediate=16)
    out = tmp_path / "out"
    for arguments in (
        ["inspect", "model", "--deep"],
        ["inspect", "model", "--json"],
        ["convert", "model", "--to", "fused-int8", "--out", out, "--dry-run"],
        ["convert", "model", "--to", "fused-int8", "--out", out],
        ["convert", out, "--to", "quark", "--out", tmp_path / "back"],
        ["verify", out, "--source", "model", "--device", "cpu", "--tokens", "2"],
        ["engines"],
    ):
        done = offline(*arguments, cwd=tmp_path)
        assert done.returncode == 0, (arguments, done.stderr)
        assert "network" not in done.stderr


def test_code_and_repos_named_in_a_config_are_not_used(tmp_path: Path) -> None:
    """``auto_map`` makes transformers import files of the checkpoint, or of another repo."""
    model = Model()
    model.config["auto_map"] = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "evil/repo--modeling_x.XModel"}
    model.config["_name_or_path"] = "evil/repo"
    folder = model.write(tmp_path / "model")
    assert offline("inspect", folder, cwd=tmp_path).returncode == 0
    assert offline("convert", folder, "--to", "fused-int8", "--out", tmp_path / "out", cwd=tmp_path).returncode == 0


PLANTED = "import pathlib; pathlib.Path(__file__).with_name('ran').touch(); raise SystemExit('planted code ran')\n"
NAMES = (
    "modeling_x.py", "configuration_x.py", "tokenization_x.py", "setup.py", "conftest.py", "sitecustomize.py",
    "json.py", "torch.py", "safetensors.py", "rich.py", "regex.py", "xxhash.py", "typer.py", "triton.py",
    "quarkconv.py",
)  # fmt: skip


def test_code_in_a_checkpoint_is_copied_and_never_run(tmp_path: Path) -> None:
    """Also when the model is the working directory, as in ``cd model && quarkconv convert``."""
    folder = Model().write(tmp_path / "model")
    for name in NAMES:
        (folder / name).write_text(PLANTED)
    (folder / "sub").mkdir()
    (folder / "sub" / "__init__.py").write_text(PLANTED)
    program = [str(Path(sys.executable).with_name("quarkconv"))]
    out = tmp_path / "out"
    for arguments in (
        ["inspect", "--deep"],
        ["convert", "--to", "fused-int8", "--out", str(out)],
        ["verify", str(out), "--source", ".", "--device", "cpu", "--tokens", "1"],
    ):
        done = subprocess.run([*program, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("ran"))
    copied = snapshot(out)
    assert all(copied[name] == snapshot(folder)[name] for name in (*NAMES, "sub/__init__.py"))


def test_pickles_are_neither_read_nor_copied(tmp_path: Path) -> None:
    folder = Model().write(tmp_path / "model")
    for name in ("pytorch_model.bin", "model.pt", "weights.pth", "scheduler.ckpt"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    done = offline("convert", folder, "--to", "fused-int8", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    assert not list(tmp_path.rglob("ran"))


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    done = offline("inspect", tmp_path, "--json", cwd=tmp_path)
    codes = [item["code"] for item in json.loads(done.stdout)["findings"]]
    assert (done.returncode, codes) == (1, ["format-unsupported"])
    assert not (tmp_path / INDEX).exists()


FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "marshal.loads", "torch.load", "yaml.load",
    "os.system", "os.popen", "subprocess.run", "subprocess.Popen", "runpy.run_path", "shelve.open",
}  # fmt: skip


def calls(path: Path) -> Iterator[str]:
    """What a file calls, by the names that it calls it by."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_evaluates_unpickles_or_starts_anything(path: Path) -> None:
    found = FORBIDDEN & set(calls(path))
    assert not found
    source = path.read_text("utf-8")
    assert "trust_remote_code" not in source.replace("trust_remote_code=False", ""), "refused or not mentioned"
    assert "import pickle" not in source


def test_modules_are_imported_by_literal_names() -> None:
    """``import_module`` takes names from the package's own tables, never from a file."""
    users = [path.name for path in SOURCES if "import_module" in path.read_text("utf-8")]
    # The lazy public names, the commands of the program, and the engines' modules that tune times.
    assert users == ["__init__.py", "program.py", "kernels.py"]


def test_ci_installs_pinned_versions_with_hashes() -> None:
    constraints = (ROOT / "constraints.txt").read_text("utf-8")
    pinned = dict(line.split("==") for line in constraints.splitlines() if "==" in line)
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    locked = 0
    for file in ("requirements.txt", "torch.txt"):
        for line in (ROOT / ".ci" / file).read_text("utf-8").splitlines()[1:]:
            found = re.fullmatch(r"([\w.-]+)==([\w.]+)(?:\+cpu)? --hash=sha256:[0-9a-f]{64}", line)
            assert found, line
            name = found[1].lower().replace("_", "-")
            assert pinned.get(name, found[2]) == found[2], f"{line}: run .ci/lock.py"
            locked += 1
    assert locked > 50
