"""Settings of the zoo: one zoo, a file or a query of a registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.models.zoo_spec import RegistryQuery
from pipeline.settings_files import load_settings
from tests import tiny


@pytest.mark.parametrize(
    ("zoo", "message"),
    [
        ({}, "give `path`"),
        ({"path": "z.yaml", "source": "mlflow"}, "are two zoos; keep one"),
        ({"path": "z.yaml", "filter": "tags.a = 'b'"}, "`filter` asks a registry; it needs `source: mlflow`"),
        ({"path": "z.yaml", "versions": "all"}, "`versions` asks a registry"),
        ({"source": "mlflow", "alias": "a", "versions": "all"}, "an `alias` names one version"),
        ({"source": "mlfow"}, "`zoo.source` is 'mlfow'; did you mean `mlflow`"),
        ({"source": "mlflow", "filtr": "x"}, "`zoo.filtr` is not a setting; did you mean `filter`"),
    ],
)
def test_settings_name_one_zoo(tmp_path: Path, zoo: dict, message: str) -> None:
    tiny.make_settings(tmp_path, zoo=zoo)
    with pytest.raises(ConfigError) as caught:
        load_settings([tmp_path / "run.yaml"])
    assert message in str(caught.value)


def test_a_query_in_the_settings_round_trips(tmp_path: Path) -> None:
    tiny.make_settings(tmp_path, zoo={"source": "mlflow", "filter": "tags.task = 'birds'", "allow_pickle": ["old"]})
    settings = load_settings([tmp_path / "run.yaml"])
    assert type(settings).model_validate(settings.dump()) == settings
    assert settings.zoo_file == str(tmp_path / "run" / "registered.parquet")
    assert settings.zoo.query == RegistryQuery(filter="tags.task = 'birds'")
