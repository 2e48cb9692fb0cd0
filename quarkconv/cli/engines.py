"""``quarkconv engines``."""

from __future__ import annotations

from quarkconv.cli.options import Json
from quarkconv.cli.out import console, print_json
from quarkconv.inspection.engines import engine_facts


def engines(json: Json = False) -> int:
    """Print what is known of engines and INT8 MoE checkpoints, with the evidence."""
    facts = engine_facts()
    if json:
        rows = [{**fact.to_json(), "evidence": fact.evidence, "checked": fact.checked} for fact in facts]
        print_json({"schema": "quarkconv.engines/1", "engines": rows})
    else:
        from quarkconv.cli.render.inspection import engine_table

        console().print(engine_table(facts, evidence=True))
    return 0
