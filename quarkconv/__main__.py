"""``python -m quarkconv``."""

from quarkconv.cli.main import run

run()
