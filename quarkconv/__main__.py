"""``python -m quarkconv``."""

from quarkconv.cli.main import main

main()
