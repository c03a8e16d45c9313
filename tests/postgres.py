"""A PostgreSQL server of the tests' own, on a socket in a temporary folder."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from sqlalchemy import create_engine

SETTINGS = "listen_addresses='' fsync=off full_page_writes=off max_connections=50"


@dataclass(frozen=True)
class Postgres:
    """Where it is."""

    folder: Path
    programs: Path

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self.folder}"

    def create_database(self) -> str:
        """The URL of a new, empty one."""
        name = f"books_{uuid4().hex}"
        engine = create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        engine.dispose()
        return self.url(name)

    def start(self) -> None:
        words = " ".join(f"-c {setting}" for setting in SETTINGS.split())
        log = str(self.folder / "log")
        self._run("pg_ctl", "start", "-w", "-l", log, "-o", f"-k {self.folder} {words}")

    def stop(self) -> None:
        """Every connection breaks."""
        self._run("pg_ctl", "stop", "-w", "-m", "immediate")

    def make(self) -> None:
        self._run("initdb", "--username=postgres", "--auth=trust", "--no-sync")

    def _run(self, program: str, *words: str) -> None:
        # It refuses to run as root.
        user = "postgres" if os.geteuid() == 0 else None
        command = [self.programs / program, *words, "-D", self.folder / "data"]
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, user=user, group=user, cwd=self.folder
        )


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """The newest version that is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parts[-2]))
    assert found, "PostgreSQL is not installed: make postgres"
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    server = Postgres(folder, found[-1])
    try:
        server.make()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)
