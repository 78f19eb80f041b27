"""Config files: finds them by path or name, runs them, and lets one begin from another."""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

from gptjax.config_values import nearest_fields
from gptjax.errors import ConfigError, UserError, one_line
from gptjax.former_names import UnknownKeyError
from gptjax.strict_json import InvalidTextError, parse_json

CONFIG_FILE = "config.json"  # written to a work directory; can be given as --config, too
IDENTITY_KEYS = ("run_id", "adopted_steps")  # stored in it, but not settings: see identity.py


def shipped_directory() -> pathlib.Path:
    """Returns the directory of the config files that come with gptjax."""
    package = pathlib.Path(__file__).parent
    installed = package / "configs"  # a wheel has the files of configs/ there
    return installed if installed.is_dir() else package.parent / "configs"


def shipped_names() -> list[str]:
    """Returns the names of the config files that come with gptjax, such as quickstart."""
    return sorted(pathlib.Path(path).stem for path in find_configs(shipped_directory()))


def find_configs(directory: pathlib.Path) -> list[str]:
    """Returns the paths of possible config files in a directory; [] where it is missing or cannot be listed."""
    try:
        paths = sorted(directory.iterdir())
    except OSError:
        return []
    return [str(path) for path in paths if path.suffix == ".py" or path.name == CONFIG_FILE]


def locate(config: str) -> pathlib.Path:
    """Returns the path of the config file `config`: a path, or the name of a file that comes with gptjax.

    Raises:
        ConfigError: there is no such file.
    """
    file = pathlib.Path(config)
    if os.path.isfile(file):  # pathlib raises where a name is too long
        return file
    shipped = shipped_names()
    if config in shipped:
        return shipped_directory() / f"{config}.py"
    near = find_configs(file if os.path.isdir(file) else file.parent)
    raise ConfigError(
        "file not found",
        field="--config",
        value=config,
        remedy=f"available: {', '.join([*near, *shipped])}",
    )


def read_settings(config: str, fields: Iterable[str]) -> dict[str, Any]:
    """Returns the settings of a config file as nested dicts, not yet validated.

    config: as in `locate`. fields: the dotted names of all fields, for the error of a wrong one.

    Raises:
        ConfigError: the file is missing, cannot be read, or fails.
    """
    file = locate(config)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", field="--config", value=config) from error
    if file.suffix == ".json":
        return _read_json(config, content)
    try:
        return _run(config, file, content)
    except UserError:  # of this file, or of one from which it begins
        raise
    except Exception as error:  # user code raises anything; its traceback would show our frames, not the mistake
        raise _explain(config, error, fields) from error


def _run(config: str, file: pathlib.Path, content: bytes) -> dict[str, Any]:
    """Returns the settings that get_config() of a config file returns; raises what the file raises."""
    scope: dict[str, Any] = {"__name__": file.stem, "__file__": str(file)}
    # From bytes: Python itself reads a byte-order mark and a coding line. A config file is code: see SECURITY.md.
    exec(compile(content, str(file), "exec"), scope)
    is_defined = callable(scope.get("get_config"))
    values = scope["get_config"]() if is_defined else None
    if values is None:
        raise ConfigError(
            "get_config() returns nothing" if is_defined else "defines no get_config()",
            field="--config",
            value=config,
            remedy="get_config() begins with gptjax.config.default_config(), changes fields, and returns it",
        )
    return values.to_dict() if hasattr(values, "to_dict") else dict(values)


def _explain(config: str, error: Exception, fields: Iterable[str]) -> ConfigError:
    """Returns the error of a config file that raised `error`."""
    # ConfigDict hides the KeyError of an attribute in the AttributeError that it raises.
    for cause in (error, *error.args):
        if isinstance(cause, UnknownKeyError):
            near = nearest_fields(cause.name, fields)
            return ConfigError(
                f"no such config field: {one_line(cause.name)}",
                field="--config",
                value=config,
                remedy=f"nearest: {', '.join(near)}" if near else "gptjax config lists all fields",
            )
    reason = f"{type(error).__name__}: {one_line(error)}"
    return ConfigError(f"get_config() failed: {reason}", field="--config", value=config)


def _read_json(config: str, content: bytes) -> dict[str, Any]:
    try:
        return settings_in(content)
    except InvalidTextError as error:
        raise ConfigError(
            one_line(error),
            field="--config",
            value=config,
            remedy="expected the config.json of a run",
        ) from error


def settings_in(content: bytes) -> dict[str, Any]:
    """Returns the settings in the config.json of a run, without the run's identity.

    Raises:
        InvalidTextError: it is not a JSON object.
    """
    settings = parse_json(content, dict)
    for name in IDENTITY_KEYS:
        settings.pop(name, None)
    return settings


def default_workdir(config: str) -> str:
    """Returns the work directory for a config file: runs/<its name>, or the directory of a run's config.json."""
    file = pathlib.Path(config)
    return str(file.parent) if file.name == CONFIG_FILE else f"runs/{file.stem}"
