"""The parts of docs/scale.md that are measured or calculated."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from quarkconv.cloud.objects import PART_BYTES
from quarkconv.files.blocks import BLOCK_BYTES
from quarkconv.files.read_ahead import FAST_RATE, SLOW_BLOCK_BYTES

MB, MIB, TB = 10**6, 2**20, 10**12
GOAL_TIMES, GOAL_FILLED = 7, 0.9
BUSY = 0.8
PRICES = {"GET": 0.0004, "PUT": 0.005}
"""US dollars for 1,000 requests to S3 Standard in us-east-1, 2026-11: https://aws.amazon.com/s3/pricing/."""
HOW = {"part": "`--part`", "join": "`--join`", "ray": "`--ray`"}


def measured(found: dict[str, Any]) -> str:
    """What ``benchmarks/scale.py`` measured."""
    summary = found["summary"]
    lines = [
        "| | workers | runs | seconds | times one worker | of their bandwidth | steady: times one | of their bandwidth "
        "| memory of a worker | processor busy |",
        "| --- |" + " ---: |" * 9,
    ]
    for name, row in sorted(summary.items(), key=lambda item: (list(HOW).index(mode_of(item[0])), count_of(item[0]))):
        cells = [
            HOW[mode_of(name)], str(count_of(name)), str(row["runs"]), f"{row['seconds']:.1f}",
            f"{row['times_one']:.2f}", f"{percent(row['filled'])}", f"{row['times_one_steady']:.2f}",
            f"{percent(row['filled_steady'])}", f"{row['memory'] / MB:.0f} MB" if row["memory"] else "not measured",
            f"{percent(row['busy'])}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    about = f"{found['machine']}, {found['date']}, commit {found['commit']}, medians of the runs"
    return "\n".join([f"{'; '.join(models(found))}; {about}.", "", *lines, "", verdict(summary)])


def models(found: dict[str, Any]) -> Iterator[str]:
    """The models that were converted."""
    links = {"model-ray" if row["mode"] == "ray" else "model": row["link"] for row in found["rows"]}
    for name, model in found["models"].items():
        sizes = [size / MB for size in model["shards"]]
        shards = f"{len(sizes)} shards of {min(sizes):.1f} to {max(sizes):.1f} MB"
        where = "with `--ray` " if name == "model-ray" else ""
        yield f"{where}{model['bytes'] / MB:.0f} MB in {shards}, {links[name] / MB:g} MB/s a worker in each direction"


def verdict(summary: dict[str, Any]) -> str:
    """Whether the goals are met."""
    sentences = []
    for mode, how in HOW.items():
        most = max((count_of(name) for name in summary if mode_of(name) == mode), default=0)
        if most < 2:
            continue
        one, many = summary[f"{mode}, 1"], summary[f"{mode}, {most}"]
        sentences.append(
            f"{how}: {many['times_one']:.2f} times at {most} workers ({many['times_one_steady']:.2f} steady), "
            f"{'met' if many['times_one'] >= GOAL_TIMES else 'missed'}; one worker {percent(one['filled'])}, "
            f"{'met' if one['filled'] >= GOAL_FILLED else 'missed'}."
        )
    goals = (
        f"The goals are {GOAL_TIMES} times one worker's rate at 8 workers, and {percent(GOAL_FILLED)} filled by one."
    )
    if max(row["busy"] for row in summary.values()) > BUSY:
        sentences.append("The processor was busy, so that it limited some of the runs, and not the network alone.")
    return f"{goals} {' '.join(sentences)}"


def times(found: dict[str, Any]) -> str:
    """How long 1 TB takes, by calculation, with the shares of the bandwidth that were filled."""
    steady = {count: found["summary"][f"part, {count}"]["filled_steady"] for count in (1, 8)}
    shares = [(count, share) for count in (1, 8) for share in (1.0, steady[count])]
    machines = {1: "1 machine", 8: "8 machines"}
    titles = [
        f"{machines[count]}, {rate}"
        for count in machines
        for rate in ("full rate", f"measured {percent(steady[count])}")
    ]
    lines = [f"| network of a machine | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]
    for gigabits in (10, 25, 100):
        seconds = [TB / (gigabits * 1e9 / 8) / count / share for count, share in shares]
        lines.append(f"| {gigabits} Gbit/s | {' | '.join(map(duration, seconds))} |")
    return "\n".join(lines)


def requests() -> str:
    """Requests for 1 TB to an object store, and their price."""
    gets, small, puts = (TB / size for size in (BLOCK_BYTES, SLOW_BLOCK_BYTES, PART_BYTES))
    get, less, put = (count / 1000 * PRICES[method] for count, method in ((gets, "GET"), (small, "GET"), (puts, "PUT")))
    rows = [
        ("GET", gets, f"of up to {BLOCK_BYTES // MIB} MiB", get),
        (
            "GET",
            small,
            f"of up to {SLOW_BLOCK_BYTES // MIB} MiB, where less than {FAST_RATE // MIB} MiB/s arrive",
            less,
        ),
        ("PUT", puts, f"of parts of {PART_BYTES // MIB} MiB", put),
    ]
    lines = ["| requests | at least | | list price of S3, us-east-1 |", "| --- | ---: | --- | ---: |"]
    lines += [f"| {method} | {thousands(count)} | {what} | ${price:.2f} |" for method, count, what, price in rows]
    prices = f"${PRICES['GET']} for 1,000 GET, ${PRICES['PUT']} for 1,000 PUT"
    more = "4 more requests for each of the 200 shards, about 10 with `--join`"
    return "\n".join([*lines, "", f"Prices: {prices}. {more}."])


def verification(found: dict[str, Any]) -> str:
    """``verify`` on several GPUs with the files in the page cache."""
    lines = ["| | wall, round by round | median | host memory | most memory of a GPU |", "| --- |" + " --- |" * 4]
    for name, runs in found["runs"].items():
        seconds = [run["seconds"] for run in runs]
        layer = runs[0]["layer_bytes"]
        cells = [
            f"`verify` on {name.removeprefix('verify on ').partition(',')[0]}",
            ", ".join(f"{value:.2f}" for value in seconds) + " s",
            f"{statistics.median(seconds):.2f} s",
            f"{max(run['host_bytes'] for run in runs) / layer:.2f} layers",
            f"{max(max(run['device_bytes']) for run in runs) / layer:.2f} layers",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mode_of(name: str) -> str:
    return name.partition(",")[0]


def count_of(name: str) -> int:
    return int(name.rpartition(" ")[2])


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def thousands(count: float) -> str:
    return f"{round(count, -3):,.0f}"


def duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.0f} s"
