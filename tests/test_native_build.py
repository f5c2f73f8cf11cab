"""What the build makes: the types it relies on, its instructions, the wheel, the source archive."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import filelock
import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
CPU = ROOT / "src/aftermax/kernels/cpu"
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
X86 = os.uname().machine in ("x86_64", "AMD64") if hasattr(os, "uname") else False

pytestmark = [
    pytest.mark.skipif(CXX is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks at files as Linux has them"),
]
needs_x86 = pytest.mark.skipif(not X86, reason="the other bodies are for x86-64")


def run(*command, cwd: Path, **environment: str) -> str:
    """What the command prints. It runs in `cwd`: nothing of the source tree is on its path."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name}")
    return found


# ---- torch's headers ---------------------------------------------------------------------------

TYPES = """
#include <type_traits>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include "torch_shim.h"

namespace aftermax {
static_assert(std::is_same<Value, StableIValue>::value, "StableIValue");
static_assert(std::is_same<Handle, AtenTensorHandle>::value, "AtenTensorHandle");
static_assert(TORCH_2_10 == TORCH_VERSION_2_10_0, "TORCH_VERSION_2_10_0");
#define AM_SAME(name, result, arguments) \\
  static_assert(std::is_same<decltype(&::name), result (*) arguments>::value, #name);
AM_TORCH_FUNCTIONS(AM_SAME)
}
"""


def checks_types(shim: str, folder: Path) -> subprocess.CompletedProcess:
    (folder / "torch_shim.h").write_text(shim)
    (folder / "types.cpp").write_text(TYPES)
    include = [f"-I{path}" for path in (folder, *cpp_extension.include_paths())]
    # nothing that came after 2.10 is declared
    target = "-DTORCH_TARGET_VERSION=((2ULL << 56) | (10ULL << 48))"
    command = [CXX, "-std=c++17", "-fsyntax-only", target, *include, folder / "types.cpp"]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_torch_shim_has_the_types_of_torchs_own_headers(tmp_path):
    shim = (CPU / "torch_shim.h").read_text()
    done = checks_types(shim, tmp_path)
    assert done.returncode == 0, done.stderr
    changed = shim.replace(
        "X(torch_get_num_threads, int32_t, (uint32_t*))", "X({}, int32_t, (int*))"
    )
    assert changed != shim
    done = checks_types(changed.replace("{}", "torch_get_num_threads"), tmp_path)
    assert "torch_get_num_threads" in done.stderr


# ---- what is compiled --------------------------------------------------------------------------


def test_nothing_is_built_for_the_machine_that_builds():
    text = (ROOT / "CMakeLists.txt").read_text()
    code = "\n".join(line.partition("#")[0] for line in text.splitlines())
    for flag in ("native", "-march", "-mtune", "-ffast-math", "-Ofast", "-ffp-contract=fast"):
        assert flag not in code, flag
    assert "-ffp-contract=off" in code


class Built(NamedTuple):
    """A wheel of the source tree, and the folder where its objects lie."""

    wheel: Path
    objects: Path

    def object(self, source: str) -> Path:
        (found,) = self.objects.rglob(f"{source}.cpp.o")
        return found


@pytest.fixture(scope="session")
def built(tmp_path_factory, worker_id) -> Built:
    """Built once, whichever workers ask."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent
    out, objects = folder / "wheel", folder / "objects"
    with filelock.FileLock(folder / "wheel.lock"):
        if not (out / "done").exists():
            run(
                *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out),
                *(f"-Cbuild-dir={objects}", ROOT),
                cwd=folder,
            )
            (out / "done").touch()
    (wheel,) = out.glob("*.whl")
    return Built(wheel, objects)


def instructions(file: Path) -> list[str]:
    """Mnemonic and operands of every instruction."""
    said = run(tool("objdump"), "-d", "--no-show-raw-insn", file, cwd=file.parent)
    return re.findall(r"^\s*[0-9a-f]+:\s+(.+)$", said, re.MULTILINE)


@needs_x86
@pytest.mark.parametrize("source", ["core", "torch_ops", "body_portable"])
def test_what_every_processor_runs_has_no_vector_extensions(built, source):
    # all that AVX brought begins with v
    beyond = [i for i in instructions(built.object(source)) if re.match(r"v|.*%[yz]mm", i)]
    assert beyond == []


@needs_x86
def test_each_body_has_the_instructions_of_its_name_alone(built):
    avx2, avx512 = (instructions(built.object(f"body_{name}")) for name in ("avx2", "avx512"))
    assert [i for i in avx2 if re.search(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b", i)] == []
    assert any("%ymm" in i for i in avx2)
    assert any("%zmm" in i for i in avx512)


@needs_x86
@pytest.mark.parametrize("isa", ["avx2", "avx512", "portable"])
def test_no_body_offers_the_linker_code_for_another(built, isa):
    """Of several weak definitions the linker keeps one, and it may be one that not all can run."""
    file = built.object(f"body_{isa}")
    said = run(tool("nm"), "--defined-only", file, cwd=file.parent)
    symbols = re.findall(r"^\S* (\S) (\S+)$", said, re.MULTILINE)
    assert symbols
    namespace = f"aftermax_{isa}"  # mangled names spell it out
    assert [name for kind, name in symbols if kind in "WVuw" and namespace not in name] == []
    assert [name for kind, name in symbols if kind.isupper() and namespace not in name] == []


# what torch itself needs; no more of their versions than manylinux_2_28 has
LIBRARIES = {"libc.so.6", "libm.so.6", "libdl.so.2", "libstdc++.so.6", "libgcc_s.so.1"}
LIBRARIES |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
NEWEST = {"GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0)}


def test_the_library_needs_what_torch_needs_and_no_place(built, tmp_path):
    with zipfile.ZipFile(built.wheel) as wheel:
        file = wheel.extract("aftermax/kernels/libaftermax.so", tmp_path)
    dynamic = run(tool("readelf"), "-d", file, cwd=tmp_path)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)) <= LIBRARIES
    versions = run("readelf", "-V", file, cwd=tmp_path)
    for library, version in re.findall(r"Name: (GLIBCXX|CXXABI|GCC)_([\d.]+)", versions):
        assert tuple(map(int, version.split("."))) <= NEWEST[library], (library, version)


def test_the_library_shows_nothing_but_its_own_names(built, tmp_path):
    with zipfile.ZipFile(built.wheel) as wheel:
        file = wheel.extract("aftermax/kernels/libaftermax.so", tmp_path)
    said = run(tool("nm"), "-D", "--defined-only", file, cwd=tmp_path)
    names = {line.split()[-1] for line in said.splitlines()}
    assert {"am_register", "am_isa", "am_use_isa"} <= names
    # templates of the C++ library come along
    assert [name for name in names if not re.match(r"am_|_ZZ?N?K?St", name)] == []


def test_the_plain_core_runs_without_torch_and_python(built, tmp_path):
    """Some rounds of the fuzzer on the code that is shipped; `make test-sanitize` does more."""
    sources = [
        "core",
        "body_portable",
        *(["body_avx2", "body_avx512", "body_avx512bf16"] if X86 else []),
    ]
    objects = [built.object(source) for source in sources]
    fuzzer = tmp_path / "fuzz_core"
    flags = ["-std=c++17", "-O1", f"-I{CPU}", "-pthread"]
    run(CXX, *flags, ROOT / "tests/fuzz_core.cpp", *objects, "-o", fuzzer, cwd=tmp_path)
    assert "500 rounds" in run(fuzzer, "500", cwd=tmp_path)


# ---- the wheel ---------------------------------------------------------------------------------

WORKS = """
import ctypes, sys
from pathlib import Path
import torch
import aftermax
from aftermax import kernels

home = Path(sys.argv[1]).resolve()
assert home in Path(aftermax.__file__).resolve().parents, aftermax.__file__
assert kernels.absent() is None, kernels.absent()
x = 4 * torch.randn(7, 1000)
torch.testing.assert_close(aftermax.softmax(x, impl="cpu"), torch.softmax(x, -1))
hidden = x.requires_grad_()
loss = aftermax.linear_cross_entropy(hidden, torch.randn(50, 1000), torch.arange(7), impl="cpu")
loss.backward()
assert hidden.grad.isfinite().all()

# an error goes through torch, and is over when it has been caught
counted = ctypes.CDLL("libstdc++.so.6")._ZSt19uncaught_exceptionsv
for _ in range(2):
    try:
        torch.ops.aftermax.logsumexp(x.double(), 0)
    except RuntimeError as error:
        assert "float32, bfloat16 and float16" in str(error)
    else:
        raise AssertionError("no error")
    assert counted() == 0, counted()
print("works on", kernels.isa())
"""


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


def test_the_wheel_is_for_every_python_of_the_platform(built):
    tag = re.fullmatch(r"aftermax-[\w.]+-py3-none-(\w+)\.whl", built.wheel.name)
    assert tag is not None, built.wheel.name
    assert tag[1].startswith(("linux_", "manylinux_"))
    with zipfile.ZipFile(built.wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith(".dist-info/WHEEL"))
        described = email.message_from_bytes(file.read(name))
    assert described["Root-Is-Purelib"] == "false"
    assert described["Tag"] == f"py3-none-{tag[1]}"


def test_the_wheel_holds_the_library_and_not_its_sources(built):
    names = contents(built.wheel)
    assert "aftermax/kernels/libaftermax.so" in names
    assert [n for n in names if re.search(r"\.(cpp|h|o|a)$|CMake|^tests/", n)] == []
    modules = {f"aftermax/{p.relative_to(ROOT / 'src/aftermax')}" for p in python_files()}
    assert modules <= set(names)
    assert {n for n in names if n.endswith(".py")} <= modules


def python_files() -> list[Path]:
    return [p for p in (ROOT / "src/aftermax").rglob("*.py") if "__pycache__" not in p.parts]


def test_the_installed_wheel_runs_on_its_kernels(built, tmp_path):
    home = tmp_path / "home"
    install = ("install", "--no-deps", "--no-index", "--target", home, built.wheel)
    run(sys.executable, "-m", "pip", *install, cwd=tmp_path)
    # -S: an editable install in this environment would have itself imported instead
    path = os.pathsep.join((str(home), *filter(None, sys.path)))
    script = tmp_path / "works.py"
    script.write_text(WORKS)
    said = run(sys.executable, "-S", script, home, cwd=tmp_path, PYTHONPATH=path)
    assert "works on" in said


@pytest.mark.slow
def test_the_wheel_of_the_source_archive_installs_into_a_bare_environment(tmp_path):
    """As from a package index: archive, wheel made of it alone, an environment with torch."""
    run(sys.executable, "-m", "build", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (archive,) = tmp_path.glob("aftermax-*.tar.gz")
    (wheel,) = tmp_path.glob("aftermax-*.whl")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert {f"src/aftermax/kernels/cpu/{path.name}" for path in CPU.iterdir()} <= names
    assert [n for n in names if n.endswith((".so", ".o")) or n.startswith("build/")] == []

    home = tmp_path / "bare"
    venv.create(home, with_pip=True)
    python = home / "bin/python"
    version = torch.__version__.partition("+")[0]
    run(python, "-m", "pip", "install", f"torch=={version}", wheel, cwd=tmp_path, PYTHONPATH="")
    script = tmp_path / "works.py"
    script.write_text(WORKS)
    assert "works on" in run(python, script, home, cwd=tmp_path, PYTHONPATH="")
