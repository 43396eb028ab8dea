"""What every kernel takes of a device, compiled for devices that are not here: registers, memory, instructions.

The table, tests/kernels/resources.csv, is committed so that a change shows in review what it costs a kernel; the tests
compare. `make kernel-resources` writes it anew.
"""

import csv
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, get_args
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from swim.kernels import mask_loss_triton, noun_attention_triton
from swim.kernels.mask_loss import LossKind, MapScale
from swim.kernels.noun_attention import ClipKeys, Row, build_work_table

TABLE = Path(__file__).parent / "kernels" / "resources.csv"
ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a program may have; 8.6 and 8.9 have 101 376
TENSOR_MEMORY_LIMIT = 512  # columns
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Usage(NamedTuple):
    """A row of the table, of one kernel. Bytes of shared memory are a program's, of stack and local memory a thread's;
    tensor memory is counted in columns, and the rest are instructions in the code."""

    triton: str
    arch: int
    case: str
    kernel: str
    registers: int
    shared: int
    tensor_memory: int
    stack: int
    local: int
    spill_loads: int
    spill_stores: int
    hmma: int
    hgmma: int
    utchmma: int
    atomics: int
    instructions: int


class Case(NamedTuple):
    """Kernels at one shape. To add one, put into CASES a function that launches them as production does, on meta
    tensors, the names of those that must multiply on tensor cores, and whether the default test run compiles it: it
    can take 80 kernels, counted once for each of ARCHS."""

    launch: Callable[[], Any]
    tensor_cores: frozenset[str] = frozenset()
    always: bool = False


def noun_attention(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, num_rows: int, form: str) -> None:
    """Forward and backward; form is a scope, and may ask for scattered keys: those picked by an index."""
    *scattered, scope = form.split()
    rows = [Row(0, 5000 + n, ((0, 5000 + n),)) for n in range(num_rows)]
    clip = ClipKeys(0, 10, (2, 24, 32), range(10, 10 + 3 * 2 * 24 * 32, 3) if scattered else None)
    table = build_work_table(rows, [clip], scope).to("meta")  # type: ignore[arg-type]
    q, k = (torch.empty(1, 6000, h, dim, dtype=dtype, device="meta").transpose(1, 2) for h in (heads, kv_heads))
    options: dict[str, Any] = {"sizes": table.sizes, "scale": dim**-0.5}
    last = (table.key_index, table.row_ranges)
    flat, stats = noun_attention_triton.forward(q, k, table.items, table.row_position, *last, **options)
    tensors = (table.items, table.row_batch, table.row_position, table.row_parts, *last)
    noun_attention_triton.backward(flat, q, k, stats, *tensors, **options)


FORMS = ("frame", "scattered frame", "clip", "causal", "scattered causal")
# dtype, query heads, kv heads, head_dim, rows; and the forms that the default test run compiles. Where
# head_dim is not 128 three forms will do.
SHAPES: list[tuple[torch.dtype, int, int, int, int, tuple[str, ...]]] = [
    (BF16, 28, 4, 128, 1, ()),
    (BF16, 28, 4, 128, 4, ()),
    (BF16, 28, 4, 128, 8, ("frame", "causal")),
    (BF16, 28, 4, 128, 32, ()),
    (BF16, 14, 2, 64, 8, ()),
    (BF16, 16, 16, 80, 16, ("frame",)),
    (BF16, 16, 2, 96, 8, ()),
    (BF16, 16, 2, 256, 8, ()),
    (BF16, 64, 1, 128, 2, ()),
    (FP16, 28, 4, 128, 8, ()),
    (FP16, 14, 2, 64, 8, ()),
    (FP16, 16, 2, 256, 8, ()),
    (FP32, 28, 4, 128, 8, ("scattered frame",)),
    (FP32, 8, 8, 64, 32, ()),
    (FP32, 16, 2, 256, 8, ()),
]
NOUN_ATTENTION = frozenset({"lse_kernel", "map_kernel", "delta_kernel", "dq_kernel", "dk_kernel"})
CASES = {
    f"noun_attention {str(dtype)[6:]} {heads}/{kv_heads}x{dim}, {rows} rows, {form}": Case(
        partial(noun_attention, dtype, heads, kv_heads, dim, rows, form),
        frozenset() if dtype == FP32 else NOUN_ATTENTION,  # no tensor core multiplies fp32 exactly
        form in always,
    )
    for dtype, heads, kv_heads, dim, rows, always in SHAPES
    for form in FORMS
    if dim == 128 or form in ("frame", "scattered frame", "causal")
}


def pixel_sums(kind: str, scale: str, grid: tuple[int, int]) -> None:
    """The paper's shape: 5 nouns in 16 frames of 480 x 854 pixels."""
    log_map, packed = torch.empty(80, *grid, device="meta"), torch.empty(80, 480, 107, dtype=torch.uint8, device="meta")
    mask_loss_triton.pixel_sums(log_map, packed, 854, kind, scale)


# A grid of few columns has wide patches, and fewer of them in a program.
GRIDS = ((17, 31), (6, 11))
CASES |= {
    f"pixel_sums {kind}, {scale}, {grid[0]}x{grid[1]}": Case(
        partial(pixel_sums, kind, scale, grid),
        always=grid == GRIDS[0] and (kind, scale) in {("bce", "none"), ("bce", "minmax"), ("dice", "max")},
    )
    for kind in get_args(LossKind)
    for scale in get_args(MapScale)
    for grid in GRIDS
}


class OfflineDriver:
    """What Triton asks of a device to compile for it."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, _: int) -> int:
        return 0


def _disassemble(cubin: bytes, tool: str, flag: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([folder / tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def _usage(arch: int, case: str, name: str, kernel: Any) -> Usage:
    report = _disassemble(kernel.asm["cubin"], "cuobjdump", "-res-usage")
    thread = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    # An address, perhaps a predicate, the operation.
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)
    counts = Counter(line.findall(_disassemble(kernel.asm["cubin"], "nvdisasm", "-c")))
    return Usage(
        triton.__version__,
        arch,
        case,
        name,
        thread["REG"],
        kernel.metadata.shared,
        kernel.metadata.tmem_size,
        thread["STACK"],
        thread["LOCAL"],
        counts["LDL"],
        counts["STL"],
        counts["HMMA"],
        counts["HGMMA"],
        counts["UTCHMMA"],
        # In global memory. ATOMS, in shared memory, is how ptxas allocates tensor memory.
        sum(counts[name] for name in ("ATOM", "ATOMG", "RED", "REDG", "UTMAREDG", "UBLKRED")),
        sum(counts.values()),
    )


def measure(arch: int, case: str) -> list[Usage]:
    """Rows of a case, whose kernels are compiled and not run."""
    compiled: dict[str, Any] = {}
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG001
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        others = sum(name.partition("#")[0] == self.__name__ for name in compiled)
        if kernel not in compiled.values():
            compiled[f"{self.__name__}#{others + 1}" if others else self.__name__] = kernel

    driver.set_active(OfflineDriver(arch))
    with patch.object(jit.JITFunction, "run", compile_only):
        CASES[case].launch()
    return [_usage(arch, case, name, kernel) for name, kernel in compiled.items()]


def two_processes() -> ProcessPoolExecutor:
    """Processes for `measure`: a compilation keeps one core, and the process's device becomes the one offline."""
    return ProcessPoolExecutor(2, get_context("spawn"))


def measure_all(pool: Executor, archs: Iterable[int], cases: Iterable[str]) -> list[Usage]:
    work = [(arch, case) for arch in archs for case in cases]
    return [usage for usages in pool.map(measure, *zip(*work)) for usage in usages]


def read_table() -> list[Usage]:
    with TABLE.open(newline="") as file:
        return [
            Usage(**{key: int(value) if value.isdigit() else value for key, value in line.items()})  # type: ignore[arg-type]
            for line in csv.DictReader(file)
        ]


if __name__ == "__main__":
    with two_processes() as pool:
        usages = measure_all(pool, ARCHS, CASES)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Usage._fields, *usages])
    print(f"{TABLE}: {len(usages)} kernels")
