"""The build of the native library: settings, toolkits, paths, rebuilds, failures. Sources and nvcc are stand-ins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # after the installed package

from alexnet_kernels import _sources
from native_build import ninja_file, requirements, run_ninja, toolkit
from native_build.ninja_file import ISAS, write_ninja
from native_build.toolkit import Unusable

ROOT = Path(__file__).parents[1]
VARIABLES = (
    *("ALEXNET_KERNELS_CUDA", "ALEXNET_KERNELS_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"),
    *("CXX", "CXXFLAGS", "MAX_JOBS"),
)
# Compiles with g++; links nothing, since there may be no torch.
CXX = """#!/bin/bash
case " $* " in *" -shared "*) ;; *) exec g++ "$@" ;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""
# Knows the architectures of its folder's file "archs", and fails if there is a file "broken".
NVCC = """#!/bin/bash
home=$(dirname "$(dirname "$0")")
case " $* " in
  *" --version "*) echo "Cuda compilation tools, release x, $(cat "$home/version")"; exit ;;
  *" --list-gpu-arch "*) sed s/^/compute_/ "$home/archs"; exit ;;
  *" --list-gpu-code "*) sed s/^/sm_/ "$home/archs"; exit ;;
esac
for word in "$@"; do
  [[ $word =~ arch=compute_([0-9]+) ]] && ! grep -qx "${BASH_REMATCH[1]}" "$home/archs" &&
    { echo "nvcc fatal   : Unsupported gpu architecture 'compute_${BASH_REMATCH[1]}'" >&2; exit 1; }
done
case " $* " in *" --dryrun "*) echo "#$ TOP=$home/bin/.." >&2; exit ;; esac
[ -e "$home/broken" ] && { echo "cuda_runtime.h: error: $(cat "$home/broken")" >&2; exit 2; }
while [ $# -gt 0 ]; do case $1 in -o | -MF) echo "x:" > "$2" ;; esac; shift; done
"""
SOURCES = {
    "library.cpp": "const char* about() { return ALEXNET_BUILD; }\n",
    "cpu/first.cpp": '#include "shared.h"\nint first = SHARED;\n',
    "cpu/second.cpp": "int second;\n",
    "cpu/shared.h": "#define SHARED 1\n",
    "cuda/third.cu": "int third;\n",
}
CPU_OBJECTS = {"library.o", *(f"{name}.{isa}.o" for name in ("first", "second") for isa in ISAS)}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def make_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a CUDA toolkit, which CUDA_HOME names."""

    def make(archs: str = "80 90 100", version: str = "V13.0.88", libraries: bool = True) -> Path:
        home = tmp_path / "cuda $HOME"
        script(home / "bin" / "nvcc", NVCC)
        (home / "archs").write_text(archs.replace(" ", "\n") + "\n")
        (home / "version").write_text(version)
        if libraries:
            (home / "lib64").mkdir()
        monkeypatch.setenv("CUDA_HOME", str(home))
        return home

    return make


class Tree:
    """A source tree with the project's build and sources of a line each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in (
            "setup.py",
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "MANIFEST.in",
            "alexnet_kernels/_sources.py",
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        shutil.copytree(ROOT / "native_build", root / "native_build")
        (root / "alexnet_kernels" / "__init__.py").touch()
        for name, text in SOURCES.items():
            self.write(name, text)
        self.environment = {
            **os.environ,
            "CXX": str(script(root.parent / "c++ compiler", CXX)),
            "ALEXNET_KERNELS_CUDA": "0",
        }

    def write(self, name: str, text: str) -> None:
        path = self.root / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **variables}
        return subprocess.run(
            [sys.executable, *command], cwd=self.root, env=environment, capture_output=True, text=True
        )

    def build(self, **variables: str) -> set[str]:
        """Builds in place; the objects that were compiled."""
        result = self.run("setup.py", "build_ext", "--inplace", **variables)
        assert result.returncode == 0, result.stderr
        assert (self.root / "alexnet_kernels" / "_C.so").exists()
        return compiled(result)


def compiled(result: subprocess.CompletedProcess[str]) -> set[str]:
    return set(re.findall(r"^\[\d+/\d+\] compiling (\S+)$", result.stderr, re.MULTILINE))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree")


class TestArchitectures:
    @pytest.mark.parametrize(
        ("own", "torch", "expected"),
        [
            (None, None, ["8.0", "9.0a", "10.0+PTX"]),
            ("", " ", ["8.0", "9.0a", "10.0+PTX"]),
            ("9.0a, 10.0f", "8.0", ["9.0a", "10.0f"]),
            (None, "8.0 8.6;9.0+PTX", ["8.0", "8.6", "9.0+PTX"]),
            (None, "Ampere;Hopper", ["8.0", "8.6+PTX", "9.0a"]),
            (None, "8.6 8.6+PTX 8.6", ["8.6+PTX"]),
        ],
    )
    def test_wished(self, own: str | None, torch: str | None, expected: list[str], monkeypatch) -> None:
        for name, value in (("ALEXNET_KERNELS_ARCHS", own), ("TORCH_CUDA_ARCH_LIST", torch)):
            if value is not None:
                monkeypatch.setenv(name, value)
        assert toolkit.wished_archs() == expected

    @pytest.mark.parametrize("name", ["ALEXNET_KERNELS_ARCHS", "TORCH_CUDA_ARCH_LIST"])
    @pytest.mark.parametrize("value", ["hopper", "9", "9.0;sm_80", "8.0+PTX+PTX"])
    def test_bad_ones_are_named(self, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match=re.escape(f"{name}={value!r}: a list such as '8.0;9.0a;10.0+PTX'")):
            toolkit.wished_archs()

    def test_flags(self) -> None:
        assert toolkit.gencode("9.0a") == ["-gencode=arch=compute_90a,code=sm_90a"]
        ptx = ["-gencode=arch=compute_100,code=sm_100", "-gencode=arch=compute_100,code=compute_100"]
        assert toolkit.gencode("10.0+PTX") == ptx

    @pytest.mark.parametrize(
        ("known", "wished", "built", "left"),
        [
            ("80 90 100", toolkit.DEFAULT, ("8.0", "9.0a", "10.0+PTX"), ""),
            ("80 90", toolkit.DEFAULT, ("8.0+PTX", "9.0a"), "10.0+PTX"),  # other GPUs don't run the PTX of 9.0a
            ("80 86 90", "8.0+PTX;8.6;9.0a;10.0+PTX", ("8.0+PTX", "8.6", "9.0a"), "10.0+PTX"),
            ("80 86 90", "8.0;8.6;9.0a;10.0+PTX", ("8.0", "8.6+PTX", "9.0a"), "10.0+PTX"),
            ("80 90", "9.0a;9.0;10.0+PTX", ("9.0a", "9.0+PTX"), "10.0+PTX"),
            ("80 90", "9.0a 10.0+PTX", ("9.0a",), "10.0+PTX"),
            ("80 90", "9.0a 10.0a", ("9.0a",), "10.0a"),
            ("70 75 80 90", "7.0 7.5 8.0", ("8.0",), ""),  # too old for the kernels
            ("", "8.0", ("8.0",), ""),  # of a wrapper that has no lists
        ],
    )
    def test_unknown_ones_are_left_out_with_one_line(
        self, known, wished, built, left, make_toolkit, capfd, monkeypatch
    ):
        home = make_toolkit(known)
        if not known:
            script(home / "bin" / "nvcc", "#!/bin/sh\n")
        monkeypatch.setenv("ALEXNET_KERNELS_ARCHS", wished)
        found = toolkit.find_toolkit()
        assert found is not None
        assert found.archs == built
        lines = capfd.readouterr().err.splitlines()
        old = "7.0, 7.5: the kernels need 8.0 or later" if "7.0" in wished else ""
        unknown = left and f"{left}: {home / 'bin' / 'nvcc'} (V13.0.88) does not know them"
        assert lines == [
            f"alexnet_kernels: architectures left out: {old or unknown}; built: {', '.join(built)}"
        ] * bool(old or unknown)

    @pytest.mark.parametrize(
        ("wished", "built", "left"),
        [
            ("8.0;9.0a+PTX", ("8.0+PTX", "9.0a"), "9.0a"),
            ("9.0a+PTX", ("9.0a",), "9.0a"),
            ("9.0a+PTX;10.0+PTX", ("9.0a", "10.0+PTX"), "9.0a"),
            ("9.0a+PTX 10.0f+PTX", ("9.0a", "10.0f"), "9.0a, 10.0f"),
        ],
    )
    def test_ptx_that_only_its_own_gpus_run_is_left_out(self, wished, built, left, make_toolkit, capfd, monkeypatch):
        make_toolkit()
        monkeypatch.setenv("ALEXNET_KERNELS_ARCHS", wished)
        assert toolkit.find_toolkit().archs == built
        assert capfd.readouterr().err.splitlines() == [
            f"alexnet_kernels: architectures left out: PTX of {left}: no other GPU runs it; built: {', '.join(built)}"
        ]

    @pytest.mark.parametrize(
        ("known", "wished", "told"),
        [
            ("80 90", "9.0", "9.0"),
            ("80 90", "8.0;9.0+PTX", "8.0, 9.0+PTX"),
            ("80 90", "9.0;9.0a", None),
            ("80 90", "8.0", None),
            ("80 90", "Hopper", None),
        ],
    )
    def test_a_list_without_the_wgmma_convolution_is_told(self, known, wished, told, make_toolkit, capfd, monkeypatch):
        make_toolkit(known)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wished)
        toolkit.find_toolkit()
        line = f"alexnet_kernels: the wgmma convolution is left out: 9.0a is not among the architectures, {told}"
        assert capfd.readouterr().err.splitlines() == [line] * (told is not None)

    def test_they_reach_the_compiler_and_the_library(self, make_toolkit, tmp_path: Path, monkeypatch) -> None:
        make_toolkit("80 90")
        monkeypatch.setenv("ALEXNET_KERNELS_ARCHS", "9.0a;10.0")
        write_ninja(tmp_path, tmp_path / "_C.so", toolkit.find_toolkit())
        text = (tmp_path / "build.ninja").read_text()
        builds = compilations(text)
        assert set(builds) == {"probe", *(p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu"))}
        for flags in builds.values():
            assert "-lineinfo" in flags
            assert re.findall(r"-gencode=(\S+)", flags) == ["arch=compute_90a,code=sm_90a"]
        assert f"sources={_sources.digest(ROOT / 'csrc')} archs=9.0a" in text

    @pytest.mark.parametrize("archs", ["8.0;9.0a;10.0+PTX", "9.0a", "9.0;9.0a", "8.0;9.0;10.0+PTX", "8.0"])
    def test_sources_for_hopper(self, archs: str, make_toolkit, tmp_path: Path, monkeypatch) -> None:
        make_toolkit()
        monkeypatch.setenv("ALEXNET_KERNELS_ARCHS", archs)
        for name in ("plain.cu", "fast_sm90a.cu", "sm90a_not.cu"):
            script(tmp_path / "csrc" / "cuda" / name, "")
        monkeypatch.setattr(ninja_file, "ROOT", tmp_path)
        script(tmp_path / "alexnet_kernels" / "_sources.py", (ROOT / "alexnet_kernels" / "_sources.py").read_text())
        write_ninja(tmp_path, tmp_path / "_C.so", toolkit.find_toolkit())
        text = (tmp_path / "build.ninja").read_text()
        builds = compilations(text)
        hopper = "9.0a" in archs
        assert set(builds) == {"probe", "plain", "sm90a_not", *(["fast_sm90a"] if hopper else [])}
        assert {"-DALEXNET_SM90A" in flags.split() for flags in builds.values()} == {hopper}
        assert ("fast_sm90a.cu.o" in re.search(r"^build _C\.so: link (.*)$", text, re.MULTILINE)[1]) == hopper
        every = [flag for arch in archs.split(";") for flag in toolkit.gencode(arch)]
        for name, flags in builds.items():
            expected = toolkit.gencode("9.0a") if name == "fast_sm90a" else every
            assert re.findall(r"-gencode=\S+", flags) == expected


def compilations(text: str) -> dict[str, str]:
    """nvcc's flags for each source of a ninja file."""
    return dict(re.findall(r"build (\w+)\.cu\.o: nvcc .*\n  flags = (.*)", text))


class TestToolkit:
    def test_cuda_can_be_left_out(self, make_toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
        make_toolkit()
        monkeypatch.setenv("ALEXNET_KERNELS_CUDA", "0")
        assert toolkit.find_toolkit() is None

    def test_bad_wish_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ALEXNET_KERNELS_CUDA", "maybe")
        with pytest.raises(SystemExit, match="ALEXNET_KERNELS_CUDA='maybe'"):
            toolkit.find_toolkit()

    def test_without_nvcc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toolkit, "find_nvcc", lambda: None)
        assert toolkit.find_toolkit() is None
        monkeypatch.setenv("ALEXNET_KERNELS_CUDA", "1")
        with pytest.raises(Unusable, match="there is no nvcc: install the CUDA toolkit or set CUDA_HOME"):
            toolkit.find_toolkit()

    @pytest.mark.parametrize(
        ("settings", "nvcc", "reason"),
        [
            ({"libraries": False}, None, "has no libraries"),
            ({"version": "V12.2.140"}, None, "is V12.2.140: 12.4 or later is needed"),
            ({"archs": "50 60"}, None, r"none of .* built; 8.0, 9.0a, 10.0\+PTX: \S+ \S+ \(V13.0.88\) does not know"),
            (
                {},
                "#!/bin/sh\necho nvcc: no licence >&2; exit 3\n",
                "nvcc' --version fails: nvcc: no licence",
            ),
            ({}, "#!/bin/sh\nexit 4\n", "fails: exit status 4"),
            ({}, "#!/no/interpreter\n", "can't be started: No such file"),
        ],
    )
    def test_reasons_not_to_use_one(self, settings, nvcc, reason, make_toolkit) -> None:
        home = make_toolkit(**settings)
        if nvcc is not None:
            script(home / "bin" / "nvcc", nvcc)
        with pytest.raises(Unusable, match=reason):
            toolkit.find_toolkit()

    def test_one_that_works(self, make_toolkit, tree: Tree) -> None:
        home = make_toolkit()
        built = tree.build(ALEXNET_KERNELS_CUDA="1", CUDA_HOME=str(home))
        assert built == CPU_OBJECTS | {"third.cu.o"}

    @pytest.mark.parametrize("flaw", ["no libraries", "does not compile"])
    def test_one_that_fails(self, flaw: str, make_toolkit, tree: Tree) -> None:
        home = make_toolkit(libraries=flaw != "no libraries")
        (home / "broken").write_text("unsupported GNU version")
        tree.environment |= {"CUDA_HOME": str(home)}
        reason = "has no libraries" if flaw == "no libraries" else "cuda_runtime.h: error: unsupported GNU version"
        without = tree.run("setup.py", "build_ext", "--inplace", ALEXNET_KERNELS_CUDA="")
        assert without.returncode == 0, without.stderr
        (warning,) = [line for line in without.stderr.splitlines() if "warning" in line]
        assert "no CUDA kernels are built, only those for the CPU: " in warning
        assert reason in warning
        assert compiled(without) == CPU_OBJECTS
        insisted = tree.run("setup.py", "build_ext", "--inplace", ALEXNET_KERNELS_CUDA="1")
        assert insisted.returncode == 1
        last = insisted.stderr.splitlines()[-1]
        assert last.startswith("ALEXNET_KERNELS_CUDA=1, but ")
        assert reason in last


class TestRequirements:
    @pytest.mark.parametrize(("value", "options"), [("", []), (" ", []), ("0", []), ("00", []), ("4", ["-j", "4"])])
    def test_max_jobs(self, value: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MAX_JOBS", value)
        assert requirements.jobs() == options

    @pytest.mark.parametrize("value", ["many", "-1", "1.5"])
    def test_bad_max_jobs(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MAX_JOBS", value)
        with pytest.raises(SystemExit, match=re.escape(f"MAX_JOBS={value!r}: a number")):
            requirements.jobs()

    def test_compilers_are_commands_or_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spaced = script(tmp_path / "a b" / "c++", "")
        for value, words in (("", ["g++"]), ("env g++ -m64", ["env", "g++", "-m64"]), (str(spaced), [str(spaced)])):
            monkeypatch.setenv("CXX", value)
            assert requirements.compiler() == words
        monkeypatch.setenv("CXX", "no-compiler -m64")
        with pytest.raises(SystemExit, match="there is no 'no-compiler': install g"):
            requirements.compiler()

    @pytest.mark.parametrize("version", ["65.5.0", "75.8.0", "76.1"])
    def test_an_old_setuptools_is_named_with_the_remedy(self, version: str, tree: Tree, tmp_path: Path) -> None:
        # It has no command bdist_wheel.
        script(
            tmp_path / "old" / "setuptools" / "__init__.py", f"__version__ = '{version}'\nExtension = setup = None\n"
        )
        result = tree.run("setup.py", "build_ext", PYTHONPATH=str(tmp_path / "old"))
        assert result.returncode == 1
        assert result.stderr.splitlines() == [
            f"alexnet_kernels builds with setuptools 77 or later, and this environment has {version}: "
            "pip install -U 'setuptools>=77', or install without --no-build-isolation"
        ]

    def test_a_missing_or_old_torch_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_torch(tmp_path, "2.10.0+cpu")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torch")
        with pytest.raises(SystemExit, match=r"torch 2.11 or later, and this environment has 2.10.0\+cpu: pip install"):
            requirements.torch_folder()
        monkeypatch.setattr(sys, "path", [])
        with pytest.raises(SystemExit, match=r"this environment has none: pip install -U 'torch>=2\.11'"):
            requirements.torch_folder()


def fake_torch(folder: Path, version: str) -> Path:
    script(folder / "torch" / "__init__.py", "")
    script(folder / "torch" / "include" / "torch.h", "")
    script(
        folder / f"torch-{version}.dist-info" / "METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    )
    return folder


class TestRebuild:
    def test_only_what_changed_is_compiled(self, tmp_path: Path) -> None:
        """In a path with all that ninja or a shell treats specially."""
        tree = Tree(tmp_path / "my $HOME projects: it's & co")
        assert tree.build() == CPU_OBJECTS
        assert tree.build() == set()
        library = tree.root / "alexnet_kernels" / "_C.so"
        before = library.stat().st_mtime_ns
        tree.write("cpu/second.cpp", "int second = 2;\n")
        # The library tells the digest of its sources.
        assert tree.build() == {"library.o", *(f"second.{isa}.o" for isa in ISAS)}
        assert library.stat().st_mtime_ns > before
        tree.write("cpu/shared.h", "#define SHARED 2\n")
        assert tree.build() == {"library.o", *(f"first.{isa}.o" for isa in ISAS)}
        assert tree.build(CXXFLAGS="-DNOTE='\"a $b\"'") == CPU_OBJECTS
        assert tree.build(CXXFLAGS="-DNOTE='\"a $b\"'") == set()

    def test_pip_s_isolated_builds(self, tree: Tree, tmp_path: Path) -> None:
        """Each has torch in another folder, newly written."""

        def build(name: str, version: str) -> set[str]:
            return tree.build(PYTHONPATH=str(fake_torch(tmp_path / name, version)))

        assert build("first", "2.14.1+cpu") == CPU_OBJECTS
        shutil.rmtree(tmp_path / "first")
        assert build("second", "2.14.1+cpu") == set()
        assert build("third", "2.14.1+cu130") == CPU_OBJECTS

    def test_another_compiler(self, tree: Tree) -> None:
        tree.build()
        version = 'if [ "$*" = --version ]; then echo g++ 99; exit; fi'
        script(tree.root.parent / "c++ compiler", CXX.replace("\n", f"\n{version}\n", 1))
        assert tree.build() == CPU_OBJECTS

    def test_editable_installs_keep_their_objects(self, tree: Tree, tmp_path: Path) -> None:
        code = "from setuptools import build_meta; import sys; build_meta.build_editable(sys.argv[1])"
        for expected in (CPU_OBJECTS, set()):
            result = tree.run("-I", "-c", code, str(tmp_path))
            assert result.returncode == 0, result.stderr
            assert compiled(result) == expected


class TestFailures:
    def test_the_reason_is_at_the_end(self, tree: Tree, tmp_path: Path) -> None:
        """Of what pip prints: it calls setuptools' hooks, in a process that has no current folder on its path."""
        tree.write("cpu/second.cpp", '#include "nothing.h"\n')
        code = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
        result = tree.run("-I", "-c", code, str(tmp_path), MAX_JOBS="1")
        assert result.returncode == 1
        what, why, remedy = result.stderr.splitlines()[-3:]
        assert what == "alexnet_kernels was not built: second.generic.o failed"
        assert re.fullmatch(r"    \S+cpu/second.cpp:1:10: fatal error: nothing.h: No such file or directory", why)
        assert remedy == f"What to do: {run_ninja.OTHERWISE}"

    @pytest.mark.parametrize(
        ("target", "printed", "shown", "remedy"),
        [
            ("a.o", ["g++: fatal error: Killed signal terminated program cc1plus"], None, "MAX_JOBS=1"),
            ("a.o", ["x.s: No space left on device"], None, "the disk is full"),
            ("a.o", ["g++: error: unrecognized command-line option '-std=c++20'"], None, "g++ 11 or later"),
            ("a.cu.o", ["a.cu(3): error: no"], None, "ALEXNET_KERNELS_CUDA=0"),
            ("_C.so", ["/usr/bin/ld: cannot find -ltorch"], None, run_ninja.OTHERWISE),
            ("a.o", ["what", "ever"], None, run_ninja.OTHERWISE),
            ("a.o", [], ["it printed nothing"], run_ninja.OTHERWISE),
            ("a.o", ["note: x", *["x: error: y"] * 50], ["x: error: y"] * run_ninja.MOST, run_ninja.OTHERWISE),
        ],
    )
    def test_reasons_and_remedies(self, target, printed, shown, remedy) -> None:
        lines = ["[1/3] compiling b.o", f"FAILED: [code=1] {target} ", "g++ -c a.cpp", *printed]
        text = run_ninja.first_failure([*lines, "[2/3] compiling c.o", "late error", "ninja: build stopped"]).explain()
        first, *reason, last = text.splitlines()
        assert first == f"alexnet_kernels was not built: {target} failed"
        assert [line.strip() for line in reason] == (shown or printed)
        assert last.startswith("What to do: ")
        assert remedy in last

    def test_of_ninja_itself(self) -> None:
        failure = run_ninja.first_failure(["ninja: Entering directory `x'", "ninja: error: 'a.cpp' is missing"])
        assert "ninja failed\n    ninja: error: 'a.cpp' is missing\n" in failure.explain()
