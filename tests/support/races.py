"""Copies of the warp-specialized kernel in which a race would show.

A copy of `jit/specialized.py` sleeps before every use of a barrier and every copy into shared memory. Another copy also
has a race: it releases the operands of a step before it reads them.
"""

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import quarkconv.kernels.jit

SOURCE = Path(next(iter(quarkconv.kernels.jit.__path__)), "specialized.py")
SLEEPS = re.compile(r"^( +)(?=mbarrier\.(wait|arrive|expect)\(|_load\()", re.MULTILINE)
FUNCTIONS = re.compile(r"^@gluon\.jit\ndef (\w+)", re.MULTILINE)
PRODUCER = ("_announce", "_produce")
CONSUMERS = ("_await_tile", "_sums")
DELAY = '''@gluon.jit
def _delay(SITE: gl.constexpr):
    """Sleep for 0 to 4 microseconds: bits of the clock, multiplied by 2^32 over the golden ratio."""
    gl.inline_asm_elementwise(
        "{ .reg .u32 t; mov.u32 t, %clock; mad.lo.u32 t, t, 2654435761, $1; shr.u32 t, t, 20;"
        "nanosleep.u32 t; mov.u32 $0, t; }",
        "=r,r", [gl.program_id(0) * 613566757 + SITE * 97531], gl.int32, False, 1,
    )  # fmt: skip


'''
RELEASES = (
    "        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=step > first)\n",
    "    mbarrier.arrive(empty.index((first + steps - 1) % STAGES))\n",
)
READS = "        w = weights.index(2 * at)\n"


def delayed_kernel(folder: Path, slow: tuple[str, ...], *, early: bool = False) -> ModuleType:
    """A copy of the kernel's module whose functions `slow` sleep; `early`: operands are released before they are read.

    Both arrive at each barrier as often as the kernel does, so that neither can hang.
    """
    source = SOURCE.read_text().replace("from .", "from quarkconv.kernels.jit.")
    if early:
        for release in RELEASES:
            assert source.count(release) == 1
            source = source.replace(release, "")
        assert source.count(READS) == 1
        source = source.replace(READS, "        mbarrier.arrive(empty.index(at))\n        _delay(99)\n" + READS)
    head, *functions = re.split(r"(?=^@gluon\.jit\n)", source, flags=re.MULTILINE)
    sites = itertools.count()
    for number, text in enumerate(functions):
        if (found := FUNCTIONS.match(text)) and found[1] in slow:
            functions[number] = SLEEPS.sub(lambda found: f"{found[1]}_delay({next(sites)})\n{found[1]}", text)
    assert next(sites) >= len(slow)
    name = "_".join(("specialized", *slow, *(["early"] if early else [])))
    path = folder / f"{name}.py"
    path.write_text("".join([head, DELAY, *functions]))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
