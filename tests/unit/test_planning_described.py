"""The cluster that a plan is for: read from a line, or found here."""

from pathlib import Path

import pytest

from pipeline.cluster.spec import ClusterSpec
from pipeline.errors import ConfigError
from pipeline.planning.described import GIB, Cluster, is_shared, parse_cluster, this_machine


def test_a_description_is_of_one_node() -> None:
    found = parse_cluster("gpus=8, gpu_mem=80,cpus=64,mem=256,nodes=4,tflops=40,network=100,shared=yes")
    assert (found.nodes, found.gpus, found.cpus, found.all_gpus) == (4, 8, 64, 32)
    assert (found.gpu_memory, found.memory) == (80 * GIB, 256 * GIB)
    assert (found.flops, found.network, found.shared, found.here) == (4e13, 12.5e9, True, False)


def test_what_is_left_out_limits_nothing() -> None:
    found = parse_cluster("gpus=2")
    assert found.slots({"CPU": 1000.0}) is None
    assert found.slots({"CPU": 1000.0, "GPU": 0.5}) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu=8", "did you mean `gpus`?"),
        ("xyzzy=8", "valid: nodes, cpus"),
        ("gpus", "not of the form key=value"),
        ("", "not of the form key=value"),
        ("gpus=8,gpus=4", "given twice"),
        ("gpus=eight", "give a number"),
        ("gpus=1.5", "a whole number from 0"),
        ("gpus=-1", "a whole number from 0"),
        ("nodes=0", "a whole number from 1"),
        ("mem=0", "a number above 0"),
        ("mem=nan", "a number above 0"),
        ("nodes=inf", "a whole number from 1"),
        ("gpu_mem=80", "without GPUs"),
        ("shared=maybe", "yes or no"),
    ],
)
def test_a_description_that_is_wrong_says_what(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="--cluster") as caught:
        parse_cluster(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "slots"),
    [
        ({"CPU": 4.0}, 6),
        ({"CPU": 4.0, "GPU": 0.5}, 6),
        ({"CPU": 0.1, "GPU": 0.5}, 8),
        ({"GPU": 3.0}, 0),
        ({"CPU": 15.0}, 0),
    ],
)
def test_resources_fit_node_by_node(asked: dict[str, float], slots: int) -> None:
    # Two nodes of 14 processors: three times 4 on each, although 7 times 4 are there in all.
    assert Cluster(nodes=2, cpus=14, gpus=2).slots(asked) == slots


def test_tenths_add_up() -> None:
    assert Cluster(cpus=1.0, gpus=1).slots({"CPU": 0.1}) == 10


def test_this_machine_is_as_the_settings_have_it() -> None:
    found = this_machine(ClusterSpec(num_cpus=3, num_gpus=0))
    assert (found.nodes, found.cpus, found.gpus, found.gpu_memory, found.here) == (1, 3.0, 0, None, True)
    assert found.memory is not None and found.memory > GIB // 4


def test_settings_of_a_local_ray_do_not_describe_a_cluster() -> None:
    here = this_machine(ClusterSpec())
    assert this_machine(ClusterSpec(address="auto", num_cpus=999)).cpus == here.cpus


@pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="no mount table")
def test_a_folder_that_is_not_there_yet_lies_where_its_parent_does(tmp_path: Path) -> None:
    assert is_shared(tmp_path / "a" / "b") == is_shared(tmp_path)
    assert is_shared(Path("/proc")) is False
