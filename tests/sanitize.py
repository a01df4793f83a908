"""The kernels' tests on libraries that the compiler's sanitizers watch.

    python -m tests.sanitize address    memory, undefined behaviour: CPU kernels, emulated CUDA ones
    python -m tests.sanitize thread     races between a GPU's threads: emulated CUDA kernels

Each builds the libraries in `build/`; `make sanitize` is both, and takes half an hour on two cores.
What else is said goes to pytest.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tl1kernels
from tl1kernels.backends import cuda, native

ROOT = Path(__file__).parents[1]
FOLDER = "TL1KERNELS_SANITIZED"
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
}
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0"},
    "thread": {  # neither Python nor torch was compiled to be watched
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    },
}
OF_CUDA = ("gpu_backends", "cuda", "cuda_schedule")
OF_CPU = ("native", "native_op", "kernels", "prox", "master_weights", "coupled")
PLANTED_IN = "tests/test_cuda.py::test_numbers_are_prepared_anew_only_when_they_change"
# What measures memory or needs a lot of it, compiles something, or ends a process.
LEFT_OUT = ("needs_no_memory", "2_to_the_31", "for_cuda", "compile", "hopper", "in_silence")


def build(sanitizer: str) -> Path:
    """Build the libraries and return their folder."""
    folder, tools = ROOT / "build" / sanitizer, Path(sys.executable).parent
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_FLAGS": f"-g1 {FLAGS[sanitizer]}",
        "CMAKE_MAKE_PROGRAM": tools / "ninja",
        "Python_EXECUTABLE": sys.executable,
        "TL1_CUDA": "OFF",
        "TL1_EMULATE_CUDA": "ON",
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    cmake = str(tools / "cmake")
    subprocess.run([cmake, "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja", *defined], check=True)
    of_cpu = ["tl1kernels_cpu"] if sanitizer == "address" else []
    targets = ["tl1kernels_cuda_emulated", *of_cpu]
    subprocess.run([cmake, "--build", folder, "--target", *targets], check=True)
    return folder


def run(sanitizer: str, arguments: list[str]) -> int:
    """Build the libraries, run the tests on them and return pytest's status."""
    compiler = os.environ.get("CXX", "c++")
    runtimes = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in RUNTIMES[sanitizer]
    ]
    preload = f"LD_PRELOAD={' '.join(runtimes)}"
    environment = {
        **os.environ,
        **OPTIONS[sanitizer],
        FOLDER: str(build(sanitizer)),
        cuda.ENVIRONMENT: "emulated",
    }

    def pytest(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        # Memory lies where ThreadSanitizer expects it; and what a sanitizer says is not captured.
        command = ["setarch", "-R", "env", preload, sys.executable, "-m", "pytest", "-s"]
        command += ["-p", "tests.sanitize", *arguments]
        return subprocess.run(command, cwd=ROOT, check=False, **options)

    if sanitizer == "thread":
        planted = {**environment, "TL1KERNELS_PLANTED_RACES": "1"}
        found = pytest(PLANTED_IN, env=planted, stderr=subprocess.PIPE).stderr
        if b"ThreadSanitizer: data race" not in found:
            sys.exit("races that were planted were not found: the tests would show nothing")
    tests = [*OF_CUDA, *(OF_CPU if sanitizer == "address" else ())]
    files = [f"tests/test_{name}.py" for name in tests]
    chosen = " and ".join(f"not {name}" for name in LEFT_OUT)
    return pytest(*files, "-k", chosen, *arguments, env=environment).returncode


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))

# As pytest's plugin: what is installed is found later than what is in these folders.
if FOLDER in os.environ:
    built = Path(os.environ[FOLDER])
    tl1kernels.__path__[:0] = [str(built), str(built / "cuda")]
    assert built in cuda.load().parents
    assert built.name != "address" or built in native.load().parents
