"""Cut the vocabulary of a checkpoint: keep the first ROWS rows of the embedding and of lm_head, which Quark leaves as they are.
Everything that Quark quantized keeps its bytes.

Usage: python cut_vocabulary.py ROWS CHECKPOINT ...
"""

import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def cut(path: Path, rows: int) -> int:
    """Cut the tables of one file. Returns the number of bytes of data removed."""
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    data = bytearray()
    for name, entry in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [-1])):
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        if name in TABLES:
            assert entry["dtype"] == "BF16", name
            last = first + (last - first) // entry["shape"][0] * rows
            entry["shape"][0] = rows
        tensor = raw[start + first : start + last]
        entry["data_offsets"] = [len(data), len(data) + len(tensor)]
        data += tensor
    if len(data) == len(raw) - start:
        return 0
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return len(raw) - start - len(data)


def replace(path: Path, key: str, change: Callable[[int], int]) -> None:
    """Change one number of a JSON file and nothing else."""
    text = path.read_text()
    path.write_text(re.sub(rf'("{key}": )(\d+)', lambda match: match[1] + str(change(int(match[2]))), text, count=1))


def main(rows: int, folders: list[str]) -> None:
    """Cut each checkpoint; ``vocab_size`` and the index's ``total_size`` (of data, or of files as Quark counts) follow."""
    for folder in map(Path, folders):
        files = sorted(folder.glob("*.safetensors"))
        before = sum(path.stat().st_size for path in files)
        removed = sum([cut(path, rows) for path in files])
        removed_files = before - sum(path.stat().st_size for path in files)
        replace(folder / "config.json", "vocab_size", lambda _: rows)
        for index in folder.glob("*.index.json"):
            replace(index, "total_size", lambda total: total - (removed_files if total == before else removed))
            replace(index, "total_parameters", lambda total: total - removed // 2)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
