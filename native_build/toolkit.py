"""The CUDA toolkit: whether there is one that can be used, and for which architectures it builds."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DEFAULT = "8.0;9.0a;10.0+PTX"
HOPPER = "9.0a"
"""The architecture of wgmma and TMA, and of csrc/cuda/*_sm90a.cu."""
OLDEST = (12, 4)
LEAST = (8, 0)
"""The kernels use instructions of this architecture."""
# As in TORCH_CUDA_ARCH_LIST, except for Hopper, which is 9.0+PTX there.
NAMED = {
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": HOPPER,
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


class Unusable(Exception):
    """Why no CUDA kernels can be built here."""


@dataclass(frozen=True)
class Toolkit:
    """nvcc, what it says of its version, the architectures to build, and the folder of CUDA's libraries."""

    nvcc: str
    version: str
    archs: tuple[str, ...]
    libraries: Path


def wish() -> str:
    """ALEXNET_KERNELS_CUDA: "0", "1" or ""."""
    requested = os.environ.get("ALEXNET_KERNELS_CUDA", "")
    if requested not in ("", "0", "1"):
        raise SystemExit(f"ALEXNET_KERNELS_CUDA={requested!r}: 0, 1 or nothing expected")
    return requested


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and Path(path).exists()), None)


def find_toolkit() -> Toolkit | None:
    """The toolkit to build with; None where no CUDA kernels are to be built, or there is no nvcc.

    Raises Unusable for a toolkit that can't build them.
    """
    requested = wish()
    archs = wished_archs()
    nvcc = None if requested == "0" else find_nvcc()
    if nvcc is None:
        if requested == "1":
            raise Unusable("there is no nvcc: install the CUDA toolkit or set CUDA_HOME")
        return None
    version = _version(nvcc)
    return Toolkit(nvcc, version, buildable(nvcc, version, archs), _libraries(nvcc))


def do_without(reason: Unusable) -> None:
    """Warns that the build has no CUDA kernels; ends it if they were insisted on."""
    if wish() == "1":
        raise SystemExit(f"ALEXNET_KERNELS_CUDA=1, but {reason}")
    say(f"warning: no CUDA kernels are built, only those for the CPU: {reason}")


def say(text: str) -> None:
    print(f"alexnet_kernels: {text}", file=sys.stderr, flush=True)


def wished_archs() -> list[str]:
    """The architectures to build: of ALEXNET_KERNELS_ARCHS, else of TORCH_CUDA_ARCH_LIST, else the default."""
    name = next((n for n in ("ALEXNET_KERNELS_ARCHS", "TORCH_CUDA_ARCH_LIST") if os.environ.get(n, "").strip()), "")
    text = os.environ.get(name, DEFAULT)
    listed = ";".join(NAMED.get(word, word) for word in re.split(r"[;,\s]+", text) if word)
    found: dict[str, str] = {}
    for arch in listed.split(";"):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise SystemExit(f"{name}={text!r}: a list such as '{DEFAULT}' expected")
        plain = arch.removesuffix("+PTX")
        found[plain] = max(arch, found.get(plain, arch), key=len)
    return list(found.values())


def gencode(arch: str) -> list[str]:
    """nvcc's flags for an architecture such as "9.0a" or "10.0+PTX"."""
    plain, ptx, _ = arch.partition("+PTX")
    sm = plain.replace(".", "")
    flags = [f"-gencode=arch=compute_{sm},code=sm_{sm}"]
    return [*flags, f"-gencode=arch=compute_{sm},code=compute_{sm}"] if ptx else flags


def number(arch: str) -> tuple[int, int]:
    """(9, 0) of "9.0a" or "9.0+PTX"."""
    major, minor = arch.partition("+")[0].rstrip("af").split(".")
    return int(major), int(minor)


def general(arch: str) -> bool:
    """Whether newer GPUs run the architecture's PTX."""
    return arch.removesuffix("+PTX")[-1].isdigit()


def buildable(nvcc: str, version: str, archs: list[str]) -> tuple[str, ...]:
    """Those of the architectures that nvcc and the kernels know. Says which are left out."""
    listed = {word for option in ("--list-gpu-arch", "--list-gpu-code") for word in _ask(nvcc, option).stdout.split()}
    old = [arch for arch in archs if number(arch) < LEAST]
    unknown = [arch for arch in archs if arch not in old and not _knows(nvcc, listed, arch)]
    left = [*old, *unknown]
    # Only the GPUs that run its machine code run the PTX of 9.0a or 10.0f.
    kept = [arch if general(arch) else arch.removesuffix("+PTX") for arch in archs if arch not in left]
    reasons = [f"{', '.join(old)}: the kernels need {'.'.join(map(str, LEAST))} or later"] * bool(old)
    reasons += [f"{', '.join(unknown)}: {nvcc} ({version}) does not know them"] * bool(unknown)
    if not kept:
        raise Unusable(f"none of the architectures can be built; {'; '.join(reasons)}")
    useless = [arch.removesuffix("+PTX") for arch in archs if arch not in left and arch not in kept]
    reasons += [f"PTX of {', '.join(useless)}: no other GPU runs it"] * bool(useless)
    wished, given = (any(arch.endswith("+PTX") for arch in some) for some in (archs, kept))
    if wished and not given and (candidates := [arch for arch in kept if general(arch)]):
        # Newer GPUs compile it when they load the library.
        newest = max(candidates, key=number)
        kept[kept.index(newest)] = f"{newest}+PTX"
    if reasons:
        say(f"architectures left out: {'; '.join(reasons)}; built: {', '.join(kept)}")
    if HOPPER not in kept and number(HOPPER) in map(number, kept):
        say(f"the wgmma convolution is left out: {HOPPER} is not among the architectures, {', '.join(kept)}")
    return tuple(kept)


def _knows(nvcc: str, listed: set[str], arch: str) -> bool:
    flags = gencode(arch)
    if listed and general(arch):
        return all(name in listed for flag in flags for name in re.findall(r"(?:compute|sm)_\w+", flag))
    # The lists leave out 9.0a and the like.
    return subprocess.run([nvcc, *flags, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True).returncode == 0


def _ask(nvcc: str, *options: str) -> subprocess.CompletedProcess[str]:
    try:
        answer = subprocess.run([nvcc, *options], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise Unusable(f"{nvcc} can't be started: {error.strerror}") from None
    if answer.returncode != 0:
        said = (answer.stderr.strip() or answer.stdout.strip() or f"exit status {answer.returncode}").splitlines()
        raise Unusable(f"{shlex.join([nvcc, *options])} fails: {said[0]}")
    return answer


def _version(nvcc: str) -> str:
    found = re.search(r"V(\d+)\.(\d+)\S*", _ask(nvcc, "--version").stdout)
    if found is None:
        return "of unknown version"
    if (int(found[1]), int(found[2])) < OLDEST:
        raise Unusable(f"{nvcc} is {found[0]}: {'.'.join(map(str, OLDEST))} or later is needed")
    return found[0]


def _libraries(nvcc: str) -> Path:
    """The folder of CUDA's libraries. nvcc, which may be a wrapper script, tells where the toolkit is."""
    toolkit, folders = Path(nvcc).resolve().parent.parent, []
    for line in _ask(nvcc, "--dryrun", "-x", "cu", os.devnull).stderr.splitlines():
        name, _, value = line.removeprefix("#$ ").partition("=")
        if name == "TOP":
            toolkit = Path(value).resolve()
        elif name == "LIBRARIES":
            folders = [Path(word[2:]).resolve() for word in shlex.split(value) if word.startswith("-L")]
    folders = [toolkit / "lib64", toolkit / "lib", *sorted(toolkit.glob("targets/*/lib")), *folders]
    complete = [folder for folder in folders if (folder / "libcudart_static.a").exists()]
    found = complete or [folder for folder in folders if folder.is_dir() and folder.name != "stubs"]
    if not found:
        raise Unusable(f"the CUDA toolkit {toolkit} of {nvcc} has no libraries")
    return found[0]
