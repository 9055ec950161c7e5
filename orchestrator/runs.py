"""The operator's history of runs, in SQLite.

It is a cache: container labels and run folders on the nodes are the truth, and losing this file loses only
history. So nothing here may keep a job from starting: a broken file is set aside and a folder that cannot be
written to is replaced by memory, each with a warning.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.specs import Node, Run, RunState, Storage

SCHEMA_VERSION = 1
_BUSY_S = 10.0

_log = logging.getLogger("orch")

_TABLE = """
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    exit_code INTEGER,
    backend TEXT NOT NULL,
    started REAL NOT NULL,
    ended REAL,
    image TEXT,
    attempt INTEGER NOT NULL,
    detail TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS runs_started ON runs (started);
"""


@dataclass(frozen=True)
class Record:
    """A run and what later commands need to find it again on its nodes; holds no secret.

    `run_dir` is the run folder on the nodes; `dirs` is node name → folder where they differ. `spec` is a summary of
    the job (command, procs, gpus, …), for people and for starting it again.
    """

    run: Run
    nodes: tuple[Node, ...] = ()
    run_dir: str = ""
    dirs: Mapping[str, str] = field(default_factory=dict)
    operator: str = ""
    target: str = ""
    inventory: str = ""
    storage: Storage = field(default_factory=Storage)
    spec: Mapping[str, Any] = field(default_factory=dict)
    started: bool = True
    """False for a run that was refused or rolled back: nothing of it is on the nodes."""

    def at(self, state: RunState, **changes: Any) -> Record:
        """The same record with its run in another state."""
        return replace(self, run=self.run.at(state, **changes))


def default_path() -> Path:
    """`$ORCH_STATE/runs.sqlite`, else `$XDG_STATE_HOME/orch/…`, else `~/.local/state/orch/…`."""
    folder = os.environ.get("ORCH_STATE")
    if folder:
        return Path(folder).expanduser() / "runs.sqlite"
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "orch" / "runs.sqlite"


class History:
    """The runs that this operator started or has seen. Safe to use from several processes at once."""

    def __init__(self, database: sqlite3.Connection, path: Path | None) -> None:
        self._database = database
        self.path = path
        """None when the history is in memory only."""

    @classmethod
    def open(cls, path: Path | None = None) -> History:
        """The history at `path`, made if it is not there."""
        path = path or default_path()
        try:
            return cls(_connect(path), path)
        except _Newer as error:
            _log.warning("%s; this run is not recorded there", error)
        except sqlite3.OperationalError as error:
            _log.warning("the history %s cannot be opened (%s); going on without it", path, error)
        except sqlite3.DatabaseError as error:
            aside = _set_aside(path)
            _log.warning(
                "the history %s was damaged (%s); it is now %s and a new one is begun", path, error, aside.name
            )
            return cls(_connect(path), path)
        except OSError as error:
            _log.warning("the history %s cannot be used (%s); going on without it", path, error.strerror)
        return cls(_prepare(sqlite3.connect(":memory:", isolation_level=None)), None)

    def close(self) -> None:
        self._database.close()

    def record(self, record: Record) -> None:
        """Adds the record, or replaces the one of the same run id."""
        run = record.run
        detail = {
            "nodes": list(run.nodes),
            "hosts": [{**asdict(node), "labels": dict(node.labels)} for node in record.nodes],
            "run_dir": record.run_dir,
            "dirs": dict(record.dirs),
            "operator": record.operator,
            "target": record.target,
            "inventory": record.inventory,
            "storage": asdict(record.storage),
            "spec": dict(record.spec),
            "started": record.started,
        }
        row = (
            run.id,
            run.name,
            run.state.value,
            run.exit_code,
            run.backend,
            run.started,
            run.ended,
            run.image,
            run.attempt,
            json.dumps(detail, default=str),
        )
        with self._writing():
            self._database.execute(f"INSERT OR REPLACE INTO runs VALUES ({', '.join('?' * len(row))})", row)

    def update(self, run: Run) -> None:
        """Takes over the run's state, exit code, end and attempt; a run that is not there is not added."""
        with self._writing():
            self._database.execute(
                "UPDATE runs SET state = ?, exit_code = ?, ended = ?, attempt = ? WHERE id = ?",
                (run.state.value, run.exit_code, run.ended, run.attempt, run.id),
            )

    def get(self, run_id: str) -> Record | None:
        """The record with exactly this id."""
        row = self._database.execute(f"SELECT {_COLUMNS} FROM runs WHERE id = ?", (run_id,)).fetchone()
        return _record(row) if row else None

    def list(self, limit: int | None = None) -> list[Record]:
        """Records, newest first."""
        rows = self._database.execute(
            f"SELECT {_COLUMNS} FROM runs ORDER BY started DESC, id DESC LIMIT ?", (-1 if limit is None else limit,)
        )
        return [_record(row) for row in rows]

    def find(self, prefix: str | None = None) -> Record:
        """The run whose id begins with `prefix`; without one the latest that was started. Raises UsageError."""
        if prefix is None:
            for record in self.list():
                if record.started:
                    return record
            raise UsageError(
                "there is no run yet", hint="`orch deploy` starts one; `orch ps` looks for runs on the nodes"
            )
        exact = self.get(prefix)
        if exact is not None:
            return exact
        rows = self._database.execute(
            f"SELECT {_COLUMNS} FROM runs WHERE substr(id, 1, ?) = ? ORDER BY started DESC, id DESC",
            (len(prefix), prefix),
        ).fetchall()
        if not rows:
            raise UsageError(
                f"no run begins with {prefix!r}", hint="`orch runs` lists them; `orch ps` looks for runs on the nodes"
            )
        if len(rows) > 1:
            raise UsageError(
                f"{prefix!r} begins {len(rows)} runs", lines=[row[0] for row in rows[:20]], hint="give more of the id"
            )
        return _record(rows[0])

    def delete(self, run_id: str) -> None:
        """Forgets a run; one that is not there is no error."""
        with self._writing():
            self._database.execute("DELETE FROM runs WHERE id = ?", (run_id,))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A history that cannot be written (disk full, locked for long) costs a warning, never the run."""
        try:
            yield
        except sqlite3.OperationalError as error:
            _log.warning("the history %s could not be written: %s", self.path or "in memory", error)


_COLUMNS = "id, name, state, exit_code, backend, started, ended, image, attempt, detail"


class _Newer(Exception):
    pass


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
    try:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise _Newer(f"the history {path} is of a newer orch (schema {version}, known is {SCHEMA_VERSION})")
        if version < SCHEMA_VERSION:
            os.chmod(path, 0o600)
            database.execute("PRAGMA journal_mode = WAL")
            _prepare(database)
        database.execute(f"SELECT {_COLUMNS} FROM runs LIMIT 1").fetchone()
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection) -> sqlite3.Connection:
    database.executescript(_TABLE)
    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return database


def _set_aside(path: Path) -> Path:
    """Renames a damaged file, with its journal, to a name that says so."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    for suffix in ("", "-wal", "-shm"):
        source = path.with_name(path.name + suffix)
        with contextlib.suppress(FileNotFoundError):
            source.rename(aside.with_name(aside.name + suffix))
    return aside


def _record(row: tuple[Any, ...]) -> Record:
    run_id, name, state, exit_code, backend, started, ended, image, attempt, detail = row
    more = json.loads(detail)
    run = Run(
        id=run_id,
        name=name,
        state=RunState(state),
        backend=backend,
        nodes=tuple(more["nodes"]),
        started=started,
        exit_code=exit_code,
        ended=ended,
        image=image,
        attempt=attempt,
    )
    return Record(
        run=run,
        nodes=tuple(Node(**node) for node in more["hosts"]),
        run_dir=more["run_dir"],
        dirs=more["dirs"],
        operator=more["operator"],
        target=more["target"],
        inventory=more["inventory"],
        storage=Storage(**more["storage"]),
        spec=more["spec"],
        started=more.get("started", True),
    )
