"""All that needs a GPU, in ten minutes: the kernels' tests, then the benchmarks, by importance.

    python benchmarks/gpu.py

Needs torch >= 2.11, triton >= 3.6, numpy and pytest; the last part transformers too. Results go to $OUT, or to
benchmarks/results, logs to $OUT or runs; what was measured before a time limit is kept. Fails when a part does.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 570  # seconds in all
BENCHES = "tests/benchmarks/test_bench_gpu_"
# Name, most seconds, arguments of pytest.
PARTS = (
    ("gpu_tests", 150, ["tests/kernels", "-m", "gpu"]),
    ("gpu_pixel_loss", 90, [f"{BENCHES}kernels.py", "-m", "gpu and bench", "-s", "-k", "pixel"]),
    ("gpu_noun_rows", 240, [f"{BENCHES}kernels.py", "-m", "gpu and bench", "-s", "-k", "rows"]),
    ("gpu_step", 180, [f"{BENCHES}step.py", "-m", "gpu and bench", "-s"]),
)


def main() -> int:
    """Run every part; 1 when any failed or ran out of time."""
    logs = Path(os.environ.get("OUT") or ROOT / "runs").resolve()
    logs.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    began, failed = time.monotonic(), False
    for number, (name, most, arguments) in enumerate(PARTS):
        later = sum(min(other, 60) for _, other, _ in PARTS[number + 1 :])  # every part gets a minute at least
        limit = min(most, LIMIT - (time.monotonic() - began) - later)
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *arguments]
        log, state = logs / f"{name}.log", "passed"
        started = time.monotonic()
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
                ).returncode
                state = "passed" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                state = f"stopped after {limit:.0f} s"
        failed |= state != "passed"
        print(f"{name}: {state}, {time.monotonic() - started:.0f} s; {log.read_text().splitlines()[-1:]}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
