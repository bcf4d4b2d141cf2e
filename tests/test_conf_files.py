"""Every settings file in conf/ is valid and names files that are there."""

import re
from pathlib import Path

import pytest
import yaml

from pipeline.settings_files import load_settings
from pipeline.strict import load_yaml

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
DEMO = CONF / "demo" / "run.yaml"
MANIFESTS = ("rayjob", "shared_volume", "ray_up")


def test_the_demo_settings_are_valid_and_their_files_are_there() -> None:
    settings = load_settings([DEMO])
    assert Path(settings.zoo.path).is_file()
    assert Path(settings.task.source.path).exists()


# The others are for Kubernetes and for `ray up`, see tests/unit/test_conf_cluster.py.
OVERLAYS = sorted(set((CONF / "cluster").glob("*.yaml")) - {CONF / "cluster" / f"{name}.yaml" for name in MANIFESTS})


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_a_cluster_overlay_fits_the_demo(overlay: Path) -> None:
    assert load_settings([DEMO, overlay]) != load_settings([DEMO])


def test_the_demo_zoo_is_as_the_readme_says() -> None:
    from pipeline.models.zoo import load_zoo

    zoo = load_zoo(CONF / "demo" / "zoo.yaml")
    assert len(zoo) >= 8
    assert len({zoo[name].source.factory for name in zoo.names}) >= 3
    sizes = [path.stat().st_size for path in (CONF / "demo" / "teachers").iterdir()]
    assert sum(sizes) <= 2_000_000
    assert sum(path.stat().st_size for path in (CONF / "demo" / "data").iterdir()) <= 6_000_000


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_file_is_strict_yaml(path: Path) -> None:
    assert isinstance(load_yaml(path), dict)


def test_the_lock_names_no_index_and_pins_every_package() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if "://" in line or line.startswith("--index")]
    packages = [line for line in lines if line and line[0].isalpha()]
    assert len(packages) > 100
    assert all("==" in line for line in packages)
    assert sum("--hash=sha256:" in line for line in lines) > len(packages)


def test_the_image_and_the_lock_hold_the_same_ray() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    ray = next(line for line in lock.splitlines() if line.startswith("ray==")).split("==")[1].split()[0]
    assert f"RAY_VERSION={ray}" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_readme_s_examples_are_valid(tmp_path: Path) -> None:
    from pipeline.models.zoo import load_zoo

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    named = {re.search(r"# ([\w.]+)", block)[1]: block for block in blocks}
    for name, block in named.items():
        (tmp_path / name).write_text(block, encoding="utf-8")
    settings = load_settings([tmp_path / "run.yaml"])
    assert settings.zoo.path == str(tmp_path / "zoo.yaml")
    assert load_zoo(settings.zoo.path).names
    assert load_settings([tmp_path / "run.yaml", CONF / "cluster" / "gpu.yaml"], ["distill.loop.epochs=60"])


def test_yaml_files_say_what_they_are_for() -> None:
    for path in CONF.rglob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("#"), path
        assert yaml.safe_load(path.read_text(encoding="utf-8")) is not None
