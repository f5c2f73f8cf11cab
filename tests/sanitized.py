"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `make test-sanitize`.

First the core alone, which needs neither torch nor Python (fuzz_core.cpp); then the tests of the
kernels, in a Python that has the runtime of the sanitizers loaded before everything else. The one
argument is the folder that was built with -DAFTERMAX_SANITIZE=ON.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
FILES = (
    "test_row*.py",
    "test_cross_entropy.py",
    "test_inplace_backward.py",
    "test_linear_cross_entropy.py",
    "test_attention_kernels.py",
    "test_attention_operators.py",
    "test_linear_walk.py",
    "test_sparsek.py",
    "test_moe_kernels.py",
)
# compilers and measurements of memory have nothing to say here
LEFT_OUT = "not compile and not never_whole"
ROUNDS = 2000

# fresh memory is filled with NaN, so that a result that hangs on it differs
FRESH = "max_malloc_fill_size=1073741824:malloc_fill_byte=255"
LOADED = "from aftermax import kernels; assert kernels.absent() is None, kernels.absent()"


def runtime(library: Path) -> list[str]:
    """The sanitizers' libraries, and the C++ library: it has to be there when they look for it."""
    said = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    files = dict(re.findall(r"lib(asan|ubsan|stdc\+\+)\.so\S* => (\S+)", said))
    return [files[name] for name in ("asan", "ubsan", "stdc++")]


def run(what: str, command: list, **environment: str) -> None:
    begin = time.monotonic()
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=TESTS.parent)
    print(f"{what}: {time.monotonic() - begin:.0f} s", flush=True)
    if done.returncode != 0:
        sys.exit(f"{what}: exit status {done.returncode}")


def main(build: Path) -> None:
    undefined = "print_stacktrace=1:halt_on_error=1:abort_on_error=1"
    run("core", [build / "fuzz_core", str(ROUNDS)], ASAN_OPTIONS=FRESH, UBSAN_OPTIONS=undefined)

    library = build / "lib" / "libaftermax.so"
    sanitized = {
        "AFTERMAX_LIBRARY": str(library),
        "LD_PRELOAD": ":".join(runtime(library)),
        # Python and torch keep what they have until the end
        "ASAN_OPTIONS": f"detect_leaks=0:{FRESH}",
        "UBSAN_OPTIONS": undefined,
    }
    run("library", [sys.executable, "-c", LOADED], **sanitized)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    chosen = [
        "-m",
        "not slow",
        "-k",
        LEFT_OUT,
        *(f for name in FILES for f in sorted(TESTS.glob(name))),
    ]
    run("tests", [*pytest, "--durations=10", *chosen], **sanitized)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
