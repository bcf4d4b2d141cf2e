"""Files of tensors: put together piece by piece, whole or not there at all."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.errors import StageError
from pipeline.stages.teachers import save_tensors, stream_tensors


@pytest.mark.parametrize("views", [1, 3])
def test_slices_become_one_tensor_view_by_view(tmp_path: Path, views: int) -> None:
    torch.manual_seed(0)
    parts = [
        {"p": torch.rand(views, n, 4).half(), "features": torch.rand(views, n, 2, 3).to(dtype)}
        for n, dtype in ((5, torch.half), (1, torch.float32), (7, torch.half))
    ]
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"{number}")
    handles = [safe_open(tmp_path / f"{number}", "pt") for number in range(3)]
    stream_tensors(
        tmp_path, "joined", {name: [handle.get_slice(name) for handle in handles] for name in ("p", "features")}
    )
    found = load_file(tmp_path / "joined")
    assert torch.equal(found["p"], torch.cat([part["p"] for part in parts], 1).flatten(0, 1))
    assert found["p"].dtype == torch.half
    features = torch.cat([part["features"].float() for part in parts], 1).flatten(0, 1)
    assert torch.equal(found["features"], features)


def test_what_can_not_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match=r"file/x.*x\.safetensors: can't be written .*free room or mend"):
        save_tensors(tmp_path / "file" / "x", "x.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(StageError, match="name: can't be written"):
        (tmp_path / ".name").mkdir()
        save_tensors(tmp_path, "name", {"a": torch.zeros(2)})
    assert not (tmp_path / "name").exists()
