"""The registered student behind MLflow's own server, asked over HTTP as docs/serving.md says."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from torch import nn

from pipeline.tracking.connect import open_tracker
from pipeline.tracking.registry import register_student
from pipeline.tracking.resolve import download_model
from pipeline.tracking.spec import TrackingSpec

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    # MLflow 3.17 uses a loader strategy that SQLAlchemy 2.1 deprecates.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]
CLASSES = ["ant", "bee", "cat"]
SHAPE = (3, 8, 8)
DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


class TinyStudent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.classifier = nn.Linear(4, len(CLASSES))

    def forward(self, images):
        return self.classifier(torch.relu(self.conv(images.float() / 127.5 - 1)).mean((2, 3)))


def images(count):
    return np.random.default_rng(count).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def ask(address, body, kind="application/json"):
    """Post a request; return status and answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/invocations", data=data, headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return TinyStudent().eval()


@pytest.fixture(scope="module")
def entry(student, tmp_path_factory):
    """A registered student; gives its URI and its store's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with open_tracker(TrackingSpec(), tmp_path_factory.mktemp("run"), name="run") as tracker:
            found = register_student(
                tracker, student=student, example=images(4), classes=CLASSES, name="served", alias="champion"
            )
            yield found.uri, tracker.secret_uri


@pytest.fixture(scope="module")
def server(entry, tmp_path_factory):
    """`mlflow models serve` on a free port of the loopback interface; gives its address."""
    uri, store = entry
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local"]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # it starts uvicorn by name
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while not _there(address):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, 15)  # the session that was started above: the command and its server
        process.wait(30)


def _there(address):
    try:
        with urllib.request.urlopen(f"{address}/ping", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_the_server_answers_with_the_logits_of_the_student(server, student):
    for count in (1, 3):
        status, answer = ask(server, {"inputs": images(count).tolist()})
        assert status == 200, answer
        with torch.no_grad():
            expected = student(torch.from_numpy(images(count)))
        np.testing.assert_allclose(answer["predictions"], expected.numpy(), atol=1e-5)


def test_fractions_are_cut_off_as_the_guide_warns(server):
    black = ask(server, {"inputs": np.zeros((1, *SHAPE), int).tolist()})
    assert ask(server, {"inputs": (images(1) / 256).tolist()}) == black != ask(server, {"inputs": images(1).tolist()})


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"inputs": np.zeros((1, 3, 9, 9), int).tolist()}, "(-1, 3, 8, 8)"),
        ({"inputs": np.full((1, *SHAPE), 256).tolist()}, "256"),
        ({"inputs": np.full((1, *SHAPE), -1).tolist()}, "-1"),
        (b"no json", "JSON"),
    ],
)
def test_what_is_no_image_is_refused(server, body, part):
    status, answer = ask(server, body)
    assert status == 400
    assert part in json.dumps(answer)


def test_the_examples_of_the_guide_run(server, entry, tmp_path):
    """The Python and the shell example of docs/serving.md, with their own address and shape put in."""
    text = DOCS.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- test: (\w+) -->\n```\w+\n(.*?)```", text, re.DOTALL))
    assert set(blocks) == {"python", "curl", "device"}
    uri, store = entry
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store, "MLFLOW_DISABLE_TELEMETRY": "true"}
    np.save(tmp_path / "image.npy", images(1)[0])
    expected = logits_of(uri, store, tmp_path / "model")
    script = blocks["python"].replace("http://127.0.0.1:5001", server).replace("models:/faculty-student@champion", uri)
    done = run([sys.executable, "-W", "ignore", "-c", script], tmp_path, environment)
    name, probability = done.split()
    assert name == CLASSES[int(expected.argmax())]
    assert float(probability) == pytest.approx(float(expected.softmax(0).max()), abs=1e-3)

    there = "cuda" if torch.cuda.is_available() else "cpu"
    script = blocks["device"].replace('"cuda"', f'"{there}"').replace("models:/faculty-student@champion", uri)
    done = run([sys.executable, "-W", "ignore", "-c", script], tmp_path, environment)
    np.testing.assert_allclose(json.loads(done)[0], expected.numpy(), atol=1e-3 if there == "cuda" else 1e-5)

    if shutil.which("curl") is None:
        pytest.skip("curl is not installed, so that its example in docs/serving.md can't be run")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = run(["bash", "-ec", blocks["curl"].replace("http://127.0.0.1:5001", server)], tmp_path, environment)
    np.testing.assert_allclose(json.loads(done)["predictions"][0], expected.numpy(), atol=1e-5)


def run(command, folder, environment):
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def logits_of(uri, store, folder):
    """Ask the same model in this process; what it does not take is refused there, too."""
    model = mlflow.pyfunc.load_model(str(download_model(uri, tracking_uri=store, folder=folder)))
    with pytest.raises(mlflow.MlflowException, match="uint8"):
        model.predict(images(1).astype(np.float32) / 255)
    return torch.from_numpy(model.predict(images(1)))[0]
