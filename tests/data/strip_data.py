"""Replace safetensors files by their headers, for exports of which only the headers matter: NAME.safetensors becomes
NAME.safetensors.header (length prefix and JSON). Tests restore it as a file of the right size with zeros for data.
`xz -9e --check=sha256` makes a header ten times as small.

Usage: python strip_data.py FILE.safetensors ...
"""

import struct
import sys
from pathlib import Path

for name in sys.argv[1:]:
    path = Path(name)
    with path.open("rb") as file:
        prefix = file.read(8)
        header = file.read(struct.unpack("<Q", prefix)[0])
    path.with_name(path.name + ".header").write_bytes(prefix + header)
    path.unlink()
