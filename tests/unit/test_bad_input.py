"""What a user gets for bad input: one clear line, the right exit code, and everything done before intact."""

from __future__ import annotations

import http.server
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.command import Command
from tests.tiny import make_data, make_settings, make_zoo, write_zoo


@pytest.fixture
def cli(capsys, monkeypatch):
    return Command(capsys, monkeypatch)


@pytest.fixture(scope="module")
def zoo_source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    make_zoo(folder, ("flat", "solid"))
    return folder


@pytest.fixture
def world(tmp_path: Path, zoo_source: Path) -> Path:
    make_data(tmp_path)
    entries = yaml.safe_load((zoo_source / "zoo.yaml").read_text())["teachers"]
    (tmp_path / "teachers").mkdir()
    for path in (zoo_source / "teachers").iterdir():
        (tmp_path / "teachers" / path.name).write_bytes(path.read_bytes())
    write_zoo(tmp_path / "zoo.yaml", entries)
    return make_settings(tmp_path)


def one_line(err: str) -> str:
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    return lines[0]


def test_no_settings(cli) -> None:
    code, _, err = cli("run")
    assert code == 2
    assert "give a file with -c" in one_line(err)


def test_a_setting_that_does_not_exist(cli, world: Path) -> None:
    code, _, err = cli("run", "-c", world, "distill.loop.epoch=3")
    assert code == 2
    assert "did you mean `epochs`?" in one_line(err)


def test_a_zoo_that_does_not_exist(cli, world: Path) -> None:
    code, _, err = cli("run", "-c", world, f"zoo.path={world.parent}/absent.yaml")
    assert code == 2
    assert "absent.yaml" in one_line(err)


def test_a_teacher_that_is_not_in_the_zoo(cli, world: Path) -> None:
    code, _, err = cli("ingest", "-c", world, "zoo.only=[flta]")
    assert code == 2
    assert "flat" in one_line(err)


def test_data_that_do_not_exist(cli, world: Path) -> None:
    code, _, err = cli("ingest", "-c", world, "task.source.path=absent.npz")
    assert code == 2
    assert "absent.npz" in one_line(err)


def test_a_label_outside_the_classes(cli, world: Path) -> None:
    data = dict(np.load(world.parent / "shapes.npz"))
    data["labels"][5] = 9
    np.savez(world.parent / "shapes.npz", **data)
    code, _, err = cli("ingest", "-c", world)
    assert code == 2
    assert "9" in one_line(err)
    assert "shapes.npz" in err


def test_an_empty_class(cli, world: Path) -> None:
    data = dict(np.load(world.parent / "shapes.npz"))
    keep = data["labels"] != 2
    np.savez(
        world.parent / "shapes.npz", images=data["images"][keep], labels=data["labels"][keep], classes=data["classes"]
    )
    code, _, err = cli("ingest", "-c", world)
    assert code == 2
    assert "block" in one_line(err)


def test_images_of_a_wrong_channel_count(cli, world: Path) -> None:
    data = dict(np.load(world.parent / "shapes.npz"))
    data["images"] = np.repeat(data["images"][..., None], 5, axis=3)
    np.savez(world.parent / "shapes.npz", **data)
    code, _, err = cli("ingest", "-c", world)
    assert code == 2
    assert "5" in one_line(err)


def folder_of_images(root: Path, broken: int) -> Path:
    data = np.load(root / "shapes.npz")
    for number, (pixels, label) in enumerate(zip(data["images"], data["labels"], strict=True)):
        path = root / "images" / str(data["classes"][label]) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        if number < broken:
            path.write_bytes(path.read_bytes()[:40])
    return root / "images"


def test_an_unreadable_image_among_many_is_skipped_counted_and_listed(cli, world: Path) -> None:
    images = folder_of_images(world.parent, broken=2)
    code, out, err = cli("ingest", "-c", world, f"task.source={{type: image_folder, path: {images}}}")
    assert (code, err) == (0, "")
    assert "2 unreadable images were skipped" in " ".join(out.split())
    assert "0000.png" in out


def test_too_many_unreadable_images(cli, world: Path) -> None:
    images = folder_of_images(world.parent, broken=60)
    code, _, err = cli("ingest", "-c", world, f"task.source={{type: image_folder, path: {images}}}")
    assert code == 2
    assert "max_unreadable" in one_line(err)


def test_a_run_folder_of_another_version(cli, world: Path) -> None:
    run = world.parent / "run"
    run.mkdir()
    (run / "run.json").write_text('{"format": 99}')
    code, _, err = cli("ingest", "-c", world)
    assert code == 2
    assert "format 99" in one_line(err)


def test_no_write_permission(cli, world: Path) -> None:
    code, _, err = cli("ingest", "-c", world, "run_dir=/sys/faculty")
    assert code == 2
    assert "choose another run_dir" in one_line(err)


def test_a_tracking_server_that_refuses(cli, world: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    code, out, err = cli("run", "-c", world, f"tracking.uri=http://user:secret@127.0.0.1:{port}")
    assert code == 2
    assert str(port) in one_line(err)
    assert "secret" not in out + err
    assert not (world.parent / "run" / "ingest").exists()  # before any compute


def test_a_tracking_server_that_never_answers(cli, world: Path) -> None:
    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            released.wait(20)

        def log_message(self, *_: object) -> None:
            pass

    released = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"http://127.0.0.1:{server.server_address[1]}"
        code, _, err = cli("run", "-c", world, f"tracking.uri={uri}", "tracking.timeout=0.5")
    finally:
        released.set()
        server.shutdown()
        server.server_close()
    assert code == 2
    assert uri in one_line(err)


@pytest.mark.parametrize("tracking", ["tracking.enabled=false", "tracking.uri=jsonl"])
def test_a_registration_without_a_registry_is_refused_at_the_start(cli, world: Path, tracking: str) -> None:
    code, _, err = cli("run", "-c", world, tracking)
    assert code == 2
    assert "register.enabled=false" in one_line(err)
    assert not (world.parent / "run").exists()


def test_verbose_keeps_the_exit_code_and_adds_the_trace(cli, world: Path) -> None:
    code, _, err = cli("run", "-v", "-c", world, "distill.loop.epoch=3")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: override distill.loop.epoch=3")


def test_an_interrupt_says_how_to_go_on(cli, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.data.ingest.build_table", stop)
    code, _, err = cli("ingest", "-c", world)
    assert code == 130
    assert "the same command continues" in one_line(err)


def test_a_status_with_a_lost_weight_file_is_no_error(cli, world: Path) -> None:
    assert cli("ingest", "-c", world)[0] == 0
    (world.parent / "teachers" / "flat.safetensors").unlink()
    code, out, err = cli("run", "-c", world, "--status")
    assert (code, err) == (0, "")
    assert "assess" in out


def test_a_class_folder_that_is_renamed_is_read_again(cli, world: Path) -> None:
    images = folder_of_images(world.parent, broken=0)
    source = f"task.source={{type: image_folder, path: {images}}}"
    assert cli("ingest", "-c", world, source)[0] == 0
    (images / "slash").rename(images / "stroke")
    code, out, _ = cli("run", "-c", world, source, "--status")
    assert code == 0
    assert "ingest stale content.source" in " ".join(out.split())


def test_what_was_done_before_stays_intact(cli, world: Path) -> None:
    assert cli("ingest", "-c", world)[0] == 0
    table = next((world.parent / "run" / "ingest").glob("*/images.arrow"))
    before = table.read_bytes()
    data = dict(np.load(world.parent / "shapes.npz"))
    data["labels"][0] = 9
    np.savez(world.parent / "shapes.npz", **data)
    assert cli("ingest", "-c", world)[0] == 2
    assert table.read_bytes() == before


def test_zoo_check_reports_every_broken_teacher_and_goes_on(cli, world: Path) -> None:
    folder = world.parent
    entries = yaml.safe_load((folder / "zoo.yaml").read_text())["teachers"]
    flat, solid = entries
    weights = folder / "teachers" / "flat.safetensors"
    (folder / "teachers" / "cut.safetensors").write_bytes(weights.read_bytes()[:200])
    write_zoo(
        folder / "zoo.yaml",
        [
            flat,
            {**flat, "name": "absent", "source": {**flat["source"], "path": "teachers/absent.safetensors"}},
            {**flat, "name": "cut", "source": {**flat["source"], "path": "teachers/cut.safetensors"}, "sha256": None},
            {**flat, "name": "swapped", "source": solid["source"]},
            {**flat, "name": "miscounted", "classes": ["a", "b", "c"]},
            solid,
        ],
    )
    code, out, err = cli("zoo", "check", folder / "zoo.yaml")
    assert code == 2
    assert err == ""
    text = " ".join(out.split())
    assert "2 of 6 teachers can teach" in text
    for word in ("absent", "cut", "sha256", "miscounted"):
        assert word in text


def test_zoo_list_loads_nothing(cli, world: Path) -> None:
    for path in (world.parent / "teachers").iterdir():
        path.unlink()
    code, out, _ = cli("zoo", "list", world.parent / "zoo.yaml")
    assert code == 0
    assert "flat" in out
    assert "solid" in out
