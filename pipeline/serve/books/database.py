"""The books: one database of keys and generations, brought up to date when it is opened."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from pipeline.base.cache import locked
from pipeline.errors import BooksError
from pipeline.serve.books.migrations import HEAD

FILE_NAME = "books.sqlite"
BUSY_TIMEOUT_S = 5.0
"""How long a write waits for another process's."""
_BOUNDS = ("connect_timeout", "tcp_user_timeout", "options")
_ADVISORY_LOCK = 0x626F6F6B73
OTHERS = "name other books with --books"


def default_books() -> Path:
    """One file for everything a user serves.

    A key is its holder's, not a run's, and outlives the runs that it may ask.
    """
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "pipeline" / FILE_NAME


@contextmanager
def open_books(where: str | None = None) -> Iterator[Engine]:
    """The books in a file, in FOLDER/books.sqlite or at a database URL; else the user's own.

    They are made if they are missing. Raises BooksError for what cannot be opened, or was written
    by a newer program.
    """
    url = books_url(where)
    file = Path(str(url.database)) if url.get_backend_name() == "sqlite" else None
    if file:
        _make_file(file)
    try:
        engine = create_engine(url) if file else create_engine(_patient(url), pool_pre_ping=True)
    except ModuleNotFoundError as error:
        what = f"{error} (for PostgreSQL: pip install '.[postgres]')"
        raise BooksError(f"{shown(url)} cannot be opened: {what}; {OTHERS}") from error
    except ArgumentError as error:
        raise BooksError(f"{shown(url)} cannot be opened: {error}; {OTHERS}") from error
    if file:
        _speak_sqlite(engine)
    try:
        _bring_up_to_date(engine, file)
        yield engine
    finally:
        engine.dispose()


@contextmanager
def one_state(books: Engine) -> Iterator[Connection]:
    """All its statements see the books as they are at the first; SQLite does that by itself."""
    is_postgresql = books.dialect.name == "postgresql"
    reader = books.execution_options(isolation_level="REPEATABLE READ") if is_postgresql else books
    with reader.connect() as connection:
        yield connection


def books_url(where: str | None = None) -> URL:
    """Of what --books may name; BooksError if it is no such thing."""
    if where and "://" in where:
        try:
            url = make_url(where)
        except (ArgumentError, ValueError) as error:  # not quoted: it may hold a password
            raise BooksError(f"what --books names is no database URL; {OTHERS}") from error
        if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
            raise BooksError("books in memory would be lost; name a file with --books")
        return url
    path = Path(where) if where else default_books()
    return URL.create("sqlite", database=str(path / FILE_NAME if path.is_dir() else path))


def folder_beside(url: URL, what: str) -> Path:
    """Beside a file; for a database elsewhere, in the user's state folder."""
    if url.get_backend_name() == "sqlite":
        return Path(f"{url.database}.{what}")
    where = hashlib.sha256(shown(url).encode()).hexdigest()
    return default_books().parent / f"{where[:16]}.{what}"


def _patient(url: URL) -> URL:
    """With bounds on what is waited for, unless it has some: libpq waits for ever."""
    if url.get_backend_name() != "postgresql":
        return url
    wait_ms = round(BUSY_TIMEOUT_S * 1000)
    waits = (f"{max(wait_ms // 1000, 2)}", str(wait_ms), f"-c lock_timeout={wait_ms}")
    return url.set(query={**dict(zip(_BOUNDS, waits, strict=True)), **url.query})


def _make_file(path: Path) -> None:
    """An empty file is an empty database; nobody else is to read who asked for what."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}"
        raise BooksError(f"books cannot be kept at {path}: {what}; {OTHERS}") from error


def _speak_sqlite(engine: Engine) -> None:
    """Durable commits, foreign keys, and transactions that hold CREATE TABLE too.

    Python's driver begins none for it: https://docs.sqlalchemy.org/dialects/sqlite.html
    """

    def set_up(connection: Any, _record: object) -> None:
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000:.0f}")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    event.listen(engine, "connect", set_up)
    event.listen(engine, "begin", begin)


def _bring_up_to_date(engine: Engine, file: Path | None) -> None:
    try:
        with locked(file.parent) if file else nullcontext():
            _migrate(engine)
    except SQLAlchemyError as error:
        what = f"{shown(engine.url)} cannot be used as books: {why(error)}"
        raise BooksError(f"{what}; {OTHERS}") from error


def _version(engine: Engine) -> str:
    """The revision of the tables there; empty for none at all."""
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return ""
        return str(connection.scalar(text("SELECT version_num FROM alembic_version")))


def _migrate(engine: Engine) -> None:
    """Run the revisions that are missing, all or none."""
    version = _version(engine)
    if version == HEAD:
        return
    if version > HEAD:
        raise BooksError(
            f"{shown(engine.url)} was written by a newer version of this program "
            f"(tables {version}, known here {HEAD}); update it, or {OTHERS}"
        )
    from alembic import command  # 12 MB that a server over finished tables does without
    from alembic.config import Config

    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":  # stays with the file; readers then never wait
            connection.connection.cursor().execute("PRAGMA journal_mode=WAL")
    config = Config()
    config.set_main_option("script_location", "pipeline.serve.books:migrations")
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # of servers that start at once one makes them
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def shown(url: URL) -> str:
    """What the user named, without its password."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.difference_update_query(_BOUNDS).render_as_string(hide_password=True)


def why(error: Exception) -> str:
    """A database's own words; what it and SQLAlchemy say after the first line quotes rows."""
    return str(getattr(error, "orig", None) or error).partition("\n")[0]
