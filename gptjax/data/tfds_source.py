"""Documents of TensorFlow Datasets, and of the standard library, which TFDS stores."""

import contextlib
import dataclasses
import difflib
import io
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from gptjax.data.file_sources import list_files
from gptjax.data.reach import can_connect, hub_url
from gptjax.data.source import Document, Place, Source
from gptjax.errors import ConfigError, DataError, UnavailableError, one_line

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

TFDS_REMEDY = "rerun the command to continue the download"
PACKAGE_REMEDY = "install the package that the error names"
OFFLINE_REMEDY = "connect this machine, or prepare the data set on another one, copy it here and give tfds:/DIR"
TFDS_RETRIES = 4  # of a request, within 3 s; TFDS's own 10 take 205 s
COMMUNITY_URL = "https://storage.googleapis.com"  # of the lists of data sets of TFDS's community

# Directories of the standard library that do not hold its source text.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
LEFT_OUT |= {"pydoc_data", "encodings"}  # generated tables, which differ between versions of Python
# The documents for validation. Python 3.11 to 3.13 have these modules, and nearly the same text in each.
VALIDATION = frozenset(
    [
        "_strptime.py",
        "asyncio/subprocess.py",
        "cProfile.py",
        "difflib.py",
        "idlelib/calltip_w.py",
        "idlelib/mainmenu.py",
        "idlelib/stackviewer.py",
        "importlib/metadata/_adapters.py",
        "importlib/metadata/_collections.py",
        "multiprocessing/popen_fork.py",
        "multiprocessing/popen_forkserver.py",
        "ntpath.py",
        "optparse.py",
        "os.py",
        "pprint.py",
        "pty.py",
        "re/__init__.py",
        "socket.py",
        "stat.py",
        "tty.py",
        "turtledemo/yinyang.py",
        "types.py",
    ]
)


def is_tfds_directory(name: str) -> bool:
    """Returns whether the source is a directory that TFDS has prepared: tfds:/DIR or tfds:~/DIR."""
    kind, _, path = name.partition(":")
    return kind == "tfds" and path.startswith(("/", "~", "."))


def open_stdlib(work_dir: str) -> Source:
    """Returns the source text of the standard library, which TFDS stores in `work_dir` once."""
    # Another Python has another library. The leftovers of an interrupted run with it must not be taken for this one.
    version = platform.python_version()
    builder = _make_stdlib_builder(os.path.join(work_dir, f"python-{version}"))
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS reports a download there, but nothing is downloaded
        builder.download_and_prepare()
    return dataclasses.replace(_read_builder(builder, "stdlib", "text", id_feature="id"), validation=VALIDATION)


def _make_stdlib_builder(work_dir: str) -> "DatasetBuilder":
    import tensorflow_datasets as tfds  # here, since only prepare needs it

    # In a function, so that importing this module does not import TFDS; unregistered, so that it may be called twice.
    class Stdlib(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """The source text of the running Python's standard library, without its tests."""

        name = "stdlib"
        VERSION = tfds.core.Version("2.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "text": tfds.features.Text(),
                }
            )
            return tfds.core.DatasetInfo(
                builder=self,
                features=features,
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
            for key, (name, text) in enumerate(_read_stdlib()):
                yield key, {"id": name, "text": text}

    tfds.disable_progress_bar()
    return Stdlib(data_dir=work_dir, file_format="array_record")


def _read_stdlib() -> Iterator[tuple[str, str]]:
    root = sysconfig.get_path("stdlib")
    for path in list_files(root).paths:
        name = os.path.relpath(path, root)
        folders = os.path.dirname(name).split(os.sep)
        if not name.endswith(".py") or LEFT_OUT.intersection(folders):
            continue
        with open(path, "rb") as file, contextlib.suppress(UnicodeDecodeError):  # a few are in other encodings
            yield name, file.read().decode("utf-8")


def open_tfds(name: str, text_feature: str) -> Source:
    """Returns a data set of TFDS: by its name, or the directory of a prepared one.

    Raises:
        ConfigError: there is no such data set or feature.
        DataError: the directory does not hold a data set that can be read.
        UnavailableError: the data set cannot be downloaded.
    """
    source = f"tfds:{name}"
    if is_tfds_directory(source):
        builder = _open_directory(name)
        _check_feature(builder, source, text_feature)
        return _read_builder(builder, source, text_feature)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS reports a missing TensorFlow there, in seven lines
        builder = _make_builder(name)
        _check_feature(builder, source, text_feature)
        _download(builder, source)
    return _read_builder(builder, source, text_feature)


def open_builders(name: str) -> "list[DatasetBuilder]":
    """Returns a data set of TFDS, downloaded; all of its configs if it has several and `name` names none.

    Raises:
        ConfigError: there is no such data set.
        UnavailableError: it cannot be downloaded.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        first = _make_builder(name)
        configs = [] if "/" in name else list(first.BUILDER_CONFIGS)
        builders = [_make_builder(f"{name}/{config.name}") for config in configs] or [first]
        for builder in builders:
            _download(builder, f"tfds:{name}")
    return builders


def _open_directory(path: str) -> "DatasetBuilder":
    """Returns the builder of a directory that TFDS has prepared.

    Raises:
        DataError: it is not one, or its files cannot be read.
    """
    import tensorflow_datasets as tfds  # here, since only prepare needs it

    if not os.path.isfile(os.path.join(path, "dataset_info.json")):
        raise DataError(
            "not a data set that TFDS has prepared: no dataset_info.json in it",
            field=path,
            remedy="name the directory of one version, such as NAME/1.0.0",
        )
    try:
        builder = tfds.builder_from_directory(path)
        for name, split in builder.info.splits.items():
            cast(Any, builder).as_data_source(name)  # does not open the files yet
            for file in split.filepaths:
                os.stat(file)
    except Exception as error:  # from TFDS, protobuf and the reader of the file format
        raise DataError(
            f"cannot be read ({_reason(error)})",
            field=path,
            remedy="prepare it again, with file_format='array_record'",
        ) from error
    if not builder.info.splits:
        raise DataError("has no splits, so it is not completely prepared", field=path)
    return builder


def _make_builder(name: str) -> "DatasetBuilder":
    """Returns the builder of a data set that TFDS knows by name.

    Raises:
        ConfigError: there is no such data set, config or version.
        UnavailableError: TFDS cannot tell, because a server does not answer or a package is missing.
    """
    import tensorflow_datasets as tfds  # here, since only prepare needs it
    from tensorflow_datasets.core import naming

    with contextlib.suppress(ImportError):
        # TFDS leaves out these data sets if a package is missing that its data sets of images need.
        import tensorflow_datasets.text

    source = f"tfds:{name}"
    servers = {"huggingface": hub_url(), "kubric": COMMUNITY_URL, "robotics": COMMUNITY_URL}
    try:
        namespace = naming.parse_builder_name_kwargs(name)[0].namespace
        if namespace in servers and not can_connect([servers[namespace]]):
            raise _offline(source, servers[namespace])
        builder = tfds.builder(name, file_format="array_record")
        _ = builder.info  # computed now, by the data set's own code
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        nearest = difflib.get_close_matches(name.partition("/")[0], known, 3)
        raise ConfigError(
            _first_line(error).rstrip("."),  # the other lines list all data sets
            field="data.source",
            value=source,
            remedy=f"nearest: {', '.join(nearest)}" if nearest else "",
        ) from error
    except UnavailableError:
        raise
    except Exception as error:  # from any library that the data set's own code uses
        if isinstance(error, ValueError | AssertionError) and not _is_from_outside(error):
            raise ConfigError(_first_line(error), field="data.source", value=source) from error
        raise _unavailable(source, error) from error
    return builder


def _check_feature(builder: "DatasetBuilder", source: str, text_feature: str) -> None:
    features = list(cast(Iterable[str], builder.info.features or ()))
    if text_feature not in features:
        available = ", ".join(features) or "no features"
        raise ConfigError(
            f"{source} has {available}",
            field="data.text_feature",
            value=text_feature,
        )


def _download(builder: "DatasetBuilder", source: str) -> None:
    """Downloads and prepares a data set, unless it is on disk already.

    Raises:
        UnavailableError: that fails.
    """
    import tensorflow_datasets as tfds  # here, since only prepare needs it
    from tensorflow_datasets.core.download import downloader

    retries = TFDS_RETRIES
    if not builder.data_path.exists() and not can_connect(builder.url_infos or ()):
        if not _has_downloads(builder):
            raise _offline(source, "its server")
        retries = 0
    downloader.MAX_RETRIES = retries  # TFDS has no option for it
    # What Google's bucket has prepared is of another file format, which needs TensorFlow.
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config)
    except Exception as error:  # from any library that the data set's own code uses
        raise _unavailable(source, error) from error


def _has_downloads(builder: "DatasetBuilder") -> bool:
    """Returns whether there are complete files of the data set that TFDS downloaded before, from which it can go on."""
    directory = os.path.join(builder.data_dir_root, "downloads", builder.name)
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return any(".tmp." not in name for name in names)


def _unavailable(source: str, error: Exception) -> UnavailableError:
    remedy = PACKAGE_REMEDY if isinstance(error, ImportError) else TFDS_REMEDY
    return UnavailableError(
        f"cannot be prepared ({_reason(error)})",
        field="data.source",
        value=source,
        remedy=remedy,
    )


def _offline(source: str, server: str) -> UnavailableError:
    return UnavailableError(
        f"cannot be downloaded: {server} does not answer",
        field="data.source",
        value=source,
        remedy=OFFLINE_REMEDY,
    )


def _is_from_outside(error: BaseException | None) -> bool:
    """Returns whether a file, a server or a missing package is among the causes of `error`."""
    while error is not None:
        if isinstance(error, OSError | ImportError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    """Returns the first line of a foreign message that is not blank, without TFDS's repetition of the arguments."""
    line = next(filter(str.strip, str(error).splitlines()), "")
    return one_line(re.sub(r'^Failed to construct dataset ".*?", builder_kwargs ".*?": ', "", line))


def _read_builder(
    builder: "DatasetBuilder",
    name: str,
    text_feature: str,
    *,
    id_feature: str = "",
) -> Source:
    splits = list(builder.info.splits)
    if "train" in splits:  # a data set's own test split stays unseen
        splits = ["train"]

    counts = [builder.info.splits[split].num_examples for split in splits]

    def read(start: Place, stop: Place | None) -> Iterator[Document]:
        for number in range(start.file, len(splits)):
            if stop is not None and number > stop.file:
                return
            split = splits[number]
            rows = cast(Any, builder).as_data_source(split)
            first = start.offset if number == start.file else 0
            last = stop.offset if stop is not None and number == stop.file else len(rows)
            for index in range(first, last):
                row = rows[index]
                document_id = f"{split}/{index}"
                if id_feature:
                    document_id = _to_text(row[id_feature])
                yield Document(document_id, _to_text(row[text_feature]), Place(number, index + 1))

    def place_of(part: int, count: int) -> Place:
        index = sum(counts) * part // count
        for number, rows in enumerate(counts):
            if index < rows:
                return Place(number, index)
            index -= rows
        return Place(len(counts))

    stamp = f"{builder.info.full_name} {counts}"
    return Source(name, read, place_of=place_of, total_documents=sum(counts), stamp=stamp)


def _to_text(value: str | bytes) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value
