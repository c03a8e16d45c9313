"""Data sets on the hub as sources: which files one means at a commit, and those files on disk."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from httpx2 import HTTPError
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from pipeline.base.find import explain_fetch
from pipeline.errors import DataError
from pipeline.recipe import Source
from pipeline.sources import COMPRESSIONS, FORMATS, file_kind

_MAX_NAMES = 10
_MAX_REASON = 200


class Pinned(TypedDict):
    """What a hub source meant when the hub was asked; plain JSON, for the run's manifest."""

    commit: str
    files: list[str]
    """Paths inside the data set, in the order they are read."""


def pin(source: Source) -> Pinned:
    """Ask the hub which commit a source's revision is, and which files its subset and split are.

    `datasets` knows which they are, by the README's metadata or else by their names. No data is
    fetched. Raises DataError in one sentence for what is not there, not allowed, not reachable or
    not readable.
    """
    name = str(source.hub)
    with _asking(source):
        found = HfApi().dataset_info(name, revision=source.revision)
        commit, files = str(found.sha), [file.rfilename for file in found.siblings or ()]
        script = f"{PurePosixPath(name).name}.py"
        if script in files:
            raise DataError(
                f"{name} needs its own loading script {script}, which is not run; "
                "save its conversations as files and give these as path"
            )
        metadata = _read_metadata(name, commit) if "README.md" in files else {}
        wanted = _find_files(source, commit, _choose_subset(source, metadata))
    unreadable = next((file for file in wanted if file_kind(Path(file)) is None), None)
    if unreadable:
        raise DataError(
            f"{source.name}: {unreadable} is of a kind that is not read; "
            f"{', '.join(FORMATS)} are, each also with {' or '.join(COMPRESSIONS)} after it"
        )
    return {"commit": commit, "files": wanted}


def fetch(source: Source, pinned: Pinned) -> list[Path]:
    """The files of a pinned source on disk, in order, fetched if need be.

    What is in the cache already is found without the hub; a cut download goes on where it stopped.
    Raises DataError in one sentence.
    """
    with _asking(source):
        return [
            Path(
                hf_hub_download(
                    str(source.hub), file, repo_type="dataset", revision=pinned["commit"]
                )
            )
            for file in pinned["files"]
        ]


def _read_metadata(name: str, commit: str) -> dict[str, Any]:
    readme = hf_hub_download(name, "README.md", repo_type="dataset", revision=commit)
    try:
        return metadata_load(readme) or {}
    except (ValueError, YAMLError) as error:
        raise _invalid(name, error) from error


def _choose_subset(source: Source, metadata: dict[str, Any]) -> dict[str, Any]:
    """What the README's metadata says of the wanted subset; nothing if it speaks of no subsets."""
    from datasets.utils.metadata import MetadataConfigs

    try:
        found = MetadataConfigs.from_dataset_card_data(metadata)
        subsets = {str(name): subset for name, subset in found.items()}
        wanted = source.subset or found.get_default_config_name()
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise _invalid(str(source.hub), error) from error
    if not subsets:
        if wanted in (None, "default"):
            return {}
        raise DataError(f"{source.hub} has no subsets; leave subset {wanted} out")
    if wanted is None:
        raise DataError(f"{source.hub} has several subsets; set subset to {_list(subsets)}")
    if str(wanted) not in subsets:
        raise DataError(f"{source.hub} has no subset {wanted}; there is {_list(subsets)}")
    return dict(subsets[str(wanted)])


def _invalid(name: str, error: Exception) -> DataError:
    return DataError(f"{name}: the metadata in its README.md is not valid: {_shorten(error)}")


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_REASON]


def _find_files(source: Source, commit: str, subset: dict[str, Any]) -> list[str]:
    """The paths of the wanted split, as `datasets` would choose them."""
    from datasets.data_files import DataFilesList

    root = f"hf://datasets/{source.hub}@{commit}"
    inner = str(subset.get("data_dir") or "")
    _refuse_outside(source, [inner])
    folder = f"{root}/{inner}".rstrip("/")
    try:
        patterns = _find_patterns(source, folder, subset)
        found = list(dict.fromkeys(DataFilesList.from_patterns(patterns, folder)))
    except FileNotFoundError as error:
        raise DataError(f"{source.name} has no data files") from error
    except ValueError as error:
        raise DataError(f"{source.name}: its files cannot be told: {_shorten(error)}") from error
    if subset.get("data_files") is None:
        found = _keep_main_kind(found)
    if not found:
        raise DataError(f"{source.name} has no data files")
    return [file.removeprefix(f"{root}/") for file in found]


def _find_patterns(source: Source, folder: str, subset: dict[str, Any]) -> list[str]:
    """The glob patterns of the wanted split: the metadata's, or those that fit the files' names."""
    from datasets.data_files import get_data_patterns, sanitize_patterns

    said = subset.get("data_files")
    found = get_data_patterns(folder) if said is None else sanitize_patterns(said)
    splits = {str(split): patterns for split, patterns in found.items()}
    if source.split not in splits:
        raise DataError(f"{source.hub} has no split {source.split}; there is {_list(splits)}")
    patterns = [str(pattern) for pattern in splits[source.split]]
    _refuse_outside(source, patterns)
    return patterns


def _refuse_outside(source: Source, paths: Iterable[str]) -> None:
    """Refuse other places' files and this machine's own, before they are asked for or looked at."""
    if any(":" in path or path.startswith("/") or ".." in path.split("/") for path in paths):
        raise DataError(f"{source.name}: its metadata names files outside the data set")


def _keep_main_kind(files: list[str]) -> list[str]:
    """Of files found by name alone, those of the commonest kind: not the licence beside them."""
    from datasets.load import infer_module_for_data_files_list

    # Archives would be opened over the network to learn what is in them.
    whole = [file for file in files if not file.lower().endswith(".zip")] or files
    if not any(file_kind(Path(file)) for file in whole):
        return whole
    kind = infer_module_for_data_files_list(whole)
    return [file for file in whole if infer_module_for_data_files_list([file]) == kind]


def _list(names: Iterable[str]) -> str:
    known = list(names)
    more = f" and {len(known) - _MAX_NAMES} more" if len(known) > _MAX_NAMES else ""
    return ", ".join(known[:_MAX_NAMES]) + more


@contextmanager
def _asking(source: Source) -> Iterator[None]:
    """Whatever goes wrong between here and the hub is a DataError in one sentence."""
    try:
        yield
    except (HTTPError, HFValidationError, UnicodeError, OSError) as error:
        raise DataError(_explain(error, source)) from error


def _explain(error: Exception, source: Source) -> str:
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return (
            f"the hub has no data set {source.hub}, or it is private: "
            "check the spelling, set HF_TOKEN"
        )
    return explain_fetch(error, str(source.hub), source.revision)
