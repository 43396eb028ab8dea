"""Promise: every kernel compiles for the devices we name, as production launches it, without spills, within their
memory, on their tensor cores, without atomics; and what it takes of them is what the committed table says.
"""

from collections.abc import Iterator
from concurrent.futures import Executor

import pytest
from interpreter import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton")

from kernel_resources import (  # noqa: E402
    ARCHS,
    CASES,
    SHARED_LIMIT,
    TENSOR_MEMORY_LIMIT,
    Usage,
    measure_all,
    read_table,
    two_processes,
)


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with two_processes() as pool:
        yield pool


def over_limit(usage: Usage) -> list[str]:
    tensor_cores = usage.kernel.partition("#")[0] in CASES[usage.case].tensor_cores
    broken = {
        "spills": usage.stack or usage.local or usage.spill_loads or usage.spill_stores,
        "more shared memory than there is": usage.shared > SHARED_LIMIT[usage.arch],
        "more tensor memory than there is": usage.tensor_memory > TENSOR_MEMORY_LIMIT,
        "atomics": usage.atomics,
        "no tensor cores": tensor_cores and not usage.hmma + usage.hgmma + usage.utchmma,
    }
    return [f"{what}: {usage}" for what, is_so in broken.items() if is_so]


def changes(table: list[Usage], measured: list[Usage]) -> list[str]:
    """What differs, a line a kernel. Another Triton's numbers are its own: then only the kernels are compared."""
    before, after = ({(row.arch, row.case, row.kernel): row for row in rows} for rows in (table, measured))
    lines = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        name = "sm_{}, {}, {}".format(*key)
        if old is None or new is None:
            lines.append(f"{name}: {'not in the table' if old is None else 'no longer launched'}")
        elif old.triton == new.triton and old != new:
            fields = [f"{field} {x} -> {y}" for field, x, y in zip(Usage._fields, old, new) if x != y]
            lines.append(f"{name}: {', '.join(fields)}")
    return lines


def test_the_table_has_every_case():
    assert {(row.arch, row.case) for row in read_table()} == {(arch, case) for arch in ARCHS for case in CASES}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"])
def test_kernels_take_what_the_table_says(pool, arch, every):
    cases = [name for name, case in CASES.items() if every or case.always]
    measured = measure_all(pool, [arch], cases)
    assert every or len(measured) * len(ARCHS) <= 80, "more than the default test run can take"
    assert [line for usage in measured for line in over_limit(usage)] == []
    table = [row for row in read_table() if row.arch == arch and row.case in cases]
    different = changes(table, measured)
    hint = f"not as in resources.csv; if this is meant, `make kernel-resources` (here Triton is {triton.__version__})"
    assert not different, "\n".join([hint, *different])
