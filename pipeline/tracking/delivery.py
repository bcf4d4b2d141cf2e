"""From records to calls of MLflow's client: runs found by key, numbers in batches, no point twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.tracking.entries import clean_name
from pipeline.tracking.tracker import ERROR_TAG, KEY_TAG

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

PARENT_TAG = "mlflow.parentRunId"
_OUTAGE_CODES = {"TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED", "UNAUTHENTICATED"}
_NETWORK = ("requests.", "urllib3.", "botocore.", "boto3.")


class Refused(Exception):
    """A record that can't be sent, whatever the store says."""


@dataclass
class _State:
    """What a run of the store holds already, as far as it had to be looked up."""

    run_id: str
    continued: bool
    params: dict[str, str] = field(default_factory=dict)
    points: dict[str, dict[int, set[str]]] = field(default_factory=dict)


class Delivery:
    """Knows which runs are open and what they hold. One thread uses it.

    Parameters
    ----------
    client : callable
        Gives the client.
    experiment : str or callable
        The experiment of new runs: its id, or what finds it.
    roots : mapping of str to bool
        Runs that exist, and whether they held values before.
    user : str
        Whom new runs belong to.

    Attributes
    ----------
    ids : dict of str to str or None
        Handle to the run's identifier in the store; None where the store refused it.
    """

    def __init__(
        self,
        client: Callable[[], MlflowClient],
        experiment: str | Callable[[], str],
        roots: Mapping[str, bool],
        user: str,
    ) -> None:
        self.client = client
        self.ids: dict[str, str | None] = {run_id: run_id for run_id in roots}
        self._experiment, self._user = experiment, user
        self._states = {run_id: _State(run_id, continued) for run_id, continued in roots.items()}
        self._by_key: dict[tuple[str | None, str], str] = {}

    @property
    def experiment_id(self) -> str:
        """The experiment of new runs; asks the store where that is not known yet."""
        if not isinstance(self._experiment, str):
            self._experiment = self._experiment()
        return self._experiment

    def send(self, records: list[dict[str, Any]], path: Path | None = None) -> None:
        """Make the call that records of one run stand for; several of them are numbers, parameters and tags.

        Parameters
        ----------
        records : list of dict
        path : Path, optional
            Where the file of an artefact is.

        Raises
        ------
        Refused
            When the run could not be opened.
        Exception
            Whatever MLflow raises.
        """
        record = records[0]
        if record["do"] == "open":
            self._open(record)
            return
        run_id = self.ids.get(record["run"])
        if run_id is None:
            raise Refused("its run could not be opened")
        client = self.client()
        match record["do"]:
            case "artifact":
                assert path is not None
                upload = client.log_artifacts if path.is_dir() else client.log_artifact
                upload(run_id, str(path), record["folder"])
            case "document":
                client.log_dict(run_id, record["data"], record["name"])
            case "dataset":
                client.log_inputs(run_id, datasets=[_dataset(record)])
            case "end":
                client.set_terminated(run_id, record["status"], end_time=record["time"])
            case _:
                self._log_batch(client, self._states[run_id], records)

    def _log_batch(self, client: MlflowClient, state: _State, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        metrics: list[Metric] = []
        new: dict[str, dict[int, set[str]]] = {}
        for record in records:
            if record["do"] == "tags":
                tags |= record["values"]
            elif record["do"] == "params":
                known = self._params(client, state) | params
                params |= {name: text for name, text in record["values"].items() if name not in known}
                # MLflow's parameters are written once.
                changed = {name: text for name, text in record["values"].items() if known.get(name, text) != text}
                tags |= {clean_name(f"changed.{name}"): text for name, text in changed.items()}
            else:
                step, summary = record["step"] or 0, record["step"] is None
                for name, number in record["values"].items():
                    held = self._held(client, state, name, step) | new.get(name, {}).get(step, set())
                    if not held or (summary and repr(number) not in held):
                        metrics.append(Metric(name, number, record["time"], step))
                        new.setdefault(name, {}).setdefault(step, set()).add(repr(number))
        client.log_batch(
            state.run_id,
            metrics=metrics,
            params=[Param(name, text) for name, text in params.items()],
            tags=[RunTag(name, text) for name, text in tags.items()],
        )
        state.params |= params
        for name, points in new.items():
            for step, numbers in points.items():
                state.points[name].setdefault(step, set()).update(numbers)

    def _params(self, client: MlflowClient, state: _State) -> dict[str, str]:
        if state.continued and not state.params:
            state.params = dict(client.get_run(state.run_id).data.params)
        return state.params

    def _held(self, client: MlflowClient, state: _State, name: str, step: int) -> set[str]:
        """Return the numbers that a run holds at a step."""
        if name not in state.points:
            history = client.get_metric_history(state.run_id, name) if state.continued else ()
            points: dict[int, set[str]] = {}
            for metric in history:
                points.setdefault(metric.step, set()).add(repr(float(metric.value)))
            state.points[name] = points
        return state.points[name].get(step, set())

    def _open(self, record: dict[str, Any]) -> None:
        """Continue the run that has this key under this parent, or create one."""
        handle, key, parent = record["run"], record["key"], self.ids.get(record["parent"])
        if handle in self.ids:
            return
        if parent is None and record["parent"] is not None:
            self.ids[handle] = None
            raise Refused("its parent could not be opened")
        client, found = self.client(), self._by_key.get((parent, key))
        if found is None:
            try:
                run, continued = open_run(
                    client,
                    self.experiment_id,
                    record["name"],
                    key,
                    parent,
                    user=self._user,
                    start=record["time"],
                    resume=not record.get("again"),
                )
            except Exception as error:
                if not is_outage(error):
                    self.ids[handle] = None
                raise
            found = self._by_key[parent, key] = run.info.run_id
            self._states.setdefault(found, _State(found, continued))
        elif not record.get("again"):
            client.update_run(found, status="RUNNING")
        self.ids[handle] = found


def open_run(
    client: MlflowClient,
    experiment_id: str,
    name: str,
    key: str | None,
    parent: str | None,
    *,
    user: str,
    start: int | None = None,
    resume: bool = True,
) -> tuple[Run, bool]:
    """Continue the run that has this key under this parent, or create one; return it and whether it was there.

    Parameters
    ----------
    client : MlflowClient
    experiment_id : str
    name : str
        Of a new run.
    key : str, optional
        What the run is found again by; without it a run is always created.
    parent : str, optional
        The parent's run id.
    user : str
        Whom a new run belongs to.
    start : int, optional
        When it began, in milliseconds since 1970.
    resume : bool
        Set a run that is there to RUNNING.
    """
    tags = {"mlflow.source.name": "faculty", "mlflow.source.type": "LOCAL", "mlflow.user": user}
    if parent is not None:
        tags[PARENT_TAG] = parent
    if key is not None:
        tags[KEY_TAG] = key
        found = _find_run(client, experiment_id, key, parent)
        if found is not None:
            if resume:
                client.update_run(found.info.run_id, status="RUNNING")
            if resume and ERROR_TAG in found.data.tags:  # what went wrong the last time does not hold for this time
                client.delete_tag(found.info.run_id, ERROR_TAG)
            return found, True
    return client.create_run(experiment_id, start_time=start, tags=tags, run_name=name), False


def is_outage(error: BaseException) -> bool:
    """Whether a call failed because the store was not there, or could not be used for now."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, Refused):
        return False
    if isinstance(error, MlflowException):
        # MLflow wraps a failed connection in an exception that has no code of its own, so the message tells.
        return error.error_code in _OUTAGE_CODES or "API request to" in str(error)
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(_NETWORK)


def _find_run(client: MlflowClient, experiment_id: str, key: str, parent: str | None) -> Run | None:
    query = f"tags.`{KEY_TAG}` = '{key}'"
    if parent is not None:
        query += f" and tags.`{PARENT_TAG}` = '{parent}'"
    found: Iterator[Run] = iter(
        client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"], max_results=1000)
    )
    return next((run for run in found if run.data.tags.get(PARENT_TAG) == parent), None)


def _dataset(record: dict[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=record["name"],
        digest=record["digest"],
        source_type="faculty",
        source=record["source"],
        profile=record["profile"],
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", record["context"])])
