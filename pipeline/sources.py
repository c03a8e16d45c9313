"""Which files a recipe's source means."""

from pathlib import Path

from pipeline.errors import DataError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".zst")


def file_kind(path: Path) -> str | None:
    """`.jsonl`, `.json`, `.csv` or `.parquet`, whatever it is compressed with; None if neither."""
    name = path.name.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return next((kind for kind in FORMATS if name.endswith(kind)), None)


def find_files(path: str) -> list[Path]:
    """The file, the data files in a folder and below it, or those a glob finds, in order of name.

    Raises DataError if there is none. A single file may have any name.
    """
    found = Path(path)
    try:
        if found.is_dir():
            files = [file for file in sorted(found.rglob("*")) if _is_data(file, found)]
            if not files:
                raise DataError(f"{path} is a folder without {', '.join(FORMATS)} files")
            return files
        if found.is_file():
            return [found]
        if found.exists():
            raise DataError(f"{path} is neither a file nor a folder")
        root = Path(found.anchor)
        files = sorted(file for file in root.glob(str(found.relative_to(root))) if file.is_file())
    except (OSError, ValueError) as error:  # a name that is too long, or ** within a word
        raise DataError(f"{path!r} is no path or glob: {error}") from error
    if not files:
        raise DataError(f"{path} is missing; data.sources paths start at {Path.cwd()}")
    return files


def _is_data(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is meant: not what editors and notebooks keep in hidden places."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and file_kind(file) is not None and not hidden


def has_files(path: str) -> bool:
    """Whether `find_files` finds any."""
    try:
        return bool(find_files(path))
    except DataError:
        return False
