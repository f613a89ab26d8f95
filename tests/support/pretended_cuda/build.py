"""Compiles device.cpp against the installed PyTorch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = [Path(__file__).with_name(name) for name in ("device.cpp", "operations.h", "tensors.h")]
CACHE = "PRETENDED_CUDA_CACHE"
"""Environment variable: the folder that keeps compiled libraries, by default one per user in the folder for temporary
files."""


class UnavailableError(Exception):
    """Why there is no pretended device here."""


def build() -> Path:
    """The shared library for the installed PyTorch, compiled once: some 20 seconds of one core.

    Raises:
        UnavailableError: with a PyTorch that has CUDA, without a compiler, or when it fails.
    """
    if torch.backends.cuda.is_built():
        raise UnavailableError("this PyTorch has CUDA: the device is pretended in a CPU-only build alone")
    compiler = shutil.which("g++")
    if compiler is None:
        raise UnavailableError("there is no g++, which compiles the pretended device")
    root = Path(torch.__file__).parent
    content = b"".join(path.read_bytes() for path in SOURCES)
    digest = hashlib.sha256(content + torch.__version__.encode() + str(root).encode()).hexdigest()[:16]
    cache = Path(os.environ.get(CACHE) or Path(tempfile.gettempdir(), f"pretended-cuda-{os.getuid()}"))
    path = cache / f"{digest}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f"{digest}-{os.getpid()}"
        _compile(compiler, root, partial)
        partial.rename(path)
    return path


def _compile(compiler: str, root: Path, library: Path) -> None:
    include = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    link = [f"-L{root}/lib", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{root}/lib"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", "-w", abi, *include, str(SOURCES[0]), *link]
    made = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    if made.returncode:
        first = next((line for line in made.stderr.splitlines() if "error" in line), made.stderr[:300])
        raise UnavailableError(f"device.cpp does not compile with PyTorch {torch.__version__}: {first}")
