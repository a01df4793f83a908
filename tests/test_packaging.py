"""What an install leaves: the library where there is a compiler, the reason where there is none."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import tl1kernels as tk
from tl1kernels.backends import cuda, native

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def sources(tmp_path):
    """Copy what a build reads, so that no build directory is shared."""
    target = tmp_path / "sources"
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("csrc", "tl1kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def build(sources, **environment):
    wheels = sources / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", str(sources), "-w", str(wheels), "-q"]
    command += ["--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_without_a_compiler_the_install_succeeds_and_says_what_is_missing(sources):
    files = build(sources, CXX="/nonexistent/c++", CC="/nonexistent/cc")
    assert "tl1kernels/optim.py" in files
    assert "tl1kernels/py.typed" in files
    assert "tl1kernels/train/chosen/digits.json" in files
    assert not [name for name in files if name.endswith(".so")]
    report = files[f"tl1kernels/{native.REPORT}"].decode()
    assert report.strip() == "no C++ compiler was found at install time"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_with_a_compiler_the_libraries_are_built_and_errors_are_errors(sources):
    with pytest.raises(AssertionError, match="TL1_CUDA=ON, but no nvcc was found"):
        build(sources, SKBUILD_CMAKE_DEFINE="TL1_CUDA=ON", CUDACXX="/nonexistent/nvcc")
    shutil.rmtree(sources / "build")  # where CMake remembers what it was told
    files = build(sources)
    assert f"tl1kernels/{native.BINARY}" in files
    assert files[f"tl1kernels/{native.REPORT}"].startswith(b"built by")
    if torch.version.cuda is None:
        assert "tl1kernels/libtl1kernels_cuda.so" not in files
        assert files[f"tl1kernels/{cuda.REPORT}"] == b"the torch beside it has no CUDA\n"
    with (sources / "csrc" / "library.cpp").open("a") as file:
        file.write("this is not C++\n")
    with pytest.raises(AssertionError, match=r"library\.cpp"):
        build(sources)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_the_installed_library_loads_beside_this_torch():
    assert native.unavailable() is None
    assert re.match(r"C\+\+ 20\d+, compiler .*, torch stable ABI 2.10", native.build_info())
    assert "tl1kernels::build_info" in torch._C._dispatch_get_all_op_names()


def test_the_readmes_commands_are_the_makefiles():
    readme, makefile = README, (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readmes_tables_are_rendered_from_the_results():
    command = [sys.executable, str(ROOT / "bench" / "readme.py"), "--check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_readme_lists_every_penalty_with_its_shape():
    rows = re.findall(r'^\| `"(\w+)"` \|.*?[^\\]\| ([\d.]*)[^|]*\| [^|]*\|$', README, re.MULTILINE)
    default = {name: row.a for name, row in tk.PENALTIES.items()}
    assert {name: float(a) if a else None for name, a in rows} == default


def test_the_version_is_one():
    assert f'version = "{tk.__version__}"' in (ROOT / "pyproject.toml").read_text()
