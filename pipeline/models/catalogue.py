"""The zoo as a Parquet catalogue: a hundred thousand teachers that open at once and are read one by one."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.whole import replacing
from pipeline.errors import ConfigError
from pipeline.models.spec import NAME_PATTERN, TeacherSpec
from pipeline.models.zoo import Zoo, absolute, relative
from pipeline.strict import validate

_SCHEMA = pa.schema([pa.field("name", pa.string(), nullable=False), pa.field("spec", pa.string(), nullable=False)])
_GROUP = 256  # rows that are read to get at one
_REMEDY = "correct it, or write the catalogue anew with `faculty zoo pack`"
_WRITER: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": False,
    "write_statistics": False,  # they would hold whole specs
    "write_page_checksum": True,
}
# What pyarrow raises on a file that is none, is cut off or holds text that is not UTF-8.
_UNREADABLE = (OSError, ValueError, pa.ArrowException)


class Catalogue(Zoo):
    """A zoo in a Parquet file with the columns `name` and `spec` (the `TeacherSpec` as JSON), a teacher a row.

    Opening reads the names; a spec is read and validated when it is asked for, so that one bad row leaves the other
    teachers usable. Paths in a spec are relative to the file. Pickled as its path and its rows.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    ConfigError
        When the file can't be read or is no Parquet, lacks a column or holds no teacher, or a name is null, twice
        there or no name. Later, when a teacher is asked for: naming file, teacher and field.
    """

    def __init__(self, path: str | Path) -> None:
        self._rows = _Rows(Path(path).absolute(), str(path))
        self._entries = self._rows.numbers()
        self.where = str(path)

    def _spec(self, name: str, entry: Any) -> TeacherSpec:
        return entry if isinstance(entry, TeacherSpec) else self._rows.spec(entry, name)


class _Rows:
    """The rows of a catalogue's file; the group that was read last is kept."""

    def __init__(self, path: Path, where: str) -> None:
        self._path, self._where = path, where
        try:
            path.open("rb").close()  # whose errors are shorter than Arrow's
        except OSError as error:
            raise ConfigError(f"{where}: can't be read ({error.strerror or error})") from None
        try:
            # Not memory-mapped: a file that someone cuts off in place would end the process.
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
        except _UNREADABLE as error:
            raise self._no_parquet(error) from None
        for field in _SCHEMA:
            self._check_column(field.name)
        groups = range(self._file.metadata.num_row_groups)
        self._ends = list(accumulate(self._file.metadata.row_group(group).num_rows for group in groups))
        self._group: tuple[int, list[Any], list[Any]] = (-1, [], [])

    def __reduce__(self) -> tuple[Any, ...]:
        return _Rows, (self._path, self._where)

    def _check_column(self, name: str) -> None:
        schema = self._file.schema_arrow
        if schema.get_field_index(name) < 0:  # also where there are two
            raise ConfigError(
                f"{self._where}: must have one column `{name}`, it has {', '.join(schema.names)}; "
                "write the catalogue with `faculty zoo pack`"
            )
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ConfigError(f"{self._where}: column `{name}` is {kind}; it must hold text")

    def numbers(self) -> dict[str, int]:
        """Read and check the names; return the row of each."""
        try:
            names = self._file.read(columns=["name"], use_threads=False).column("name").to_pylist()
        except _UNREADABLE as error:
            raise self._no_parquet(error) from None
        if not names:
            raise ConfigError(f"{self._where}: holds no teacher; write the catalogue anew with `faculty zoo pack`")
        good = re.compile(NAME_PATTERN).fullmatch  # in Arrow's own terms it would import pandas, which takes seconds
        bad = next((row for row, name in enumerate(names) if name is None or not good(name)), None)
        if bad is not None:
            raise ConfigError(
                f"{self._where}: row {bad}: `name` is {'null' if names[bad] is None else repr(names[bad])}; it must be "
                "letters, digits, `_`, `.` and `-`"
            )
        rows = {name: row for row, name in enumerate(names)}
        if len(rows) < len(names):
            repeated = Counter(names).most_common(1)[0][0]
            raise ConfigError(
                f"{self._where}: row {rows[repeated]}: `name`: two teachers are called {repeated!r}; rename one"
            )
        return rows

    def spec(self, row: int, name: str) -> TeacherSpec:
        """Read and validate one spec."""
        where = f"{self._where}: teacher {name!r}"
        found, text = self._read(row)
        if found != name:  # a copy that travelled to another process opens the file again
            raise ConfigError(f"{self._where}: is not the catalogue that it was when the run began; run again")
        if text is None:
            raise ConfigError(f"{where}: `spec` is null; {_REMEDY}")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: `spec` is no valid JSON ({_first_line(error)}); {_REMEDY}") from None
        spec = validate(TeacherSpec, data, where=where)
        if spec.name != name:
            raise ConfigError(f"{where}: `name` in its `spec` is {spec.name!r}; {_REMEDY}")
        return absolute(spec, self._path.parent)

    def _read(self, row: int) -> tuple[Any, Any]:
        number = bisect_right(self._ends, row)
        if number >= len(self._ends):
            return None, None
        if self._group[0] != number:
            try:
                group = self._file.read_row_group(number, columns=_SCHEMA.names, use_threads=False)
                self._group = (number, group.column("name").to_pylist(), group.column("spec").to_pylist())
            except _UNREADABLE as error:
                raise self._no_parquet(error) from None
        inner = row - (self._ends[number - 1] if number else 0)
        return self._group[1][inner], self._group[2][inner]

    def _no_parquet(self, error: BaseException) -> ConfigError:
        return ConfigError(
            f"{self._where}: can't be read as Parquet ({_first_line(error)}); write the catalogue anew with "
            "`faculty zoo pack`"
        )


def write_catalogue(zoo: Zoo, path: str | Path) -> None:
    """Write a zoo as a catalogue; the file appears under its name when it is complete.

    Paths of files that lie under the catalogue's folder are stored relative to it, so that the folder can be moved.

    Parameters
    ----------
    zoo : Zoo
        With at least one teacher.
    path : str or Path
        Must end in ``.parquet``, by which `load_zoo` knows a catalogue.

    Raises
    ------
    ConfigError
        When the path does not, or can't be written.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        raise ConfigError(f"{path}: must end in .parquet, by which a catalogue is known")
    if not len(zoo):
        raise ValueError("zoo must hold at least one teacher")
    folder, names = path.absolute().parent, zoo.names
    try:
        with replacing(path) as sink, pq.ParquetWriter(sink, _SCHEMA, **_WRITER) as file:
            for start in range(0, len(names), _GROUP):
                part = names[start : start + _GROUP]
                specs = [json.dumps(relative(zoo[name], folder).model_dump(mode="json")) for name in part]
                file.write_table(pa.table([part, specs], schema=_SCHEMA))
    except OSError as error:
        raise ConfigError(f"{path}: can't be written ({error.strerror or error}); choose another path") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
