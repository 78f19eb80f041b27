"""Config fields by their former names, which keep working in config files, flags, config.json and records."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("gptjax")
RENAMED = {
    "compute.unroll": "compute.scan_unroll",
    "train.nan_limit": "train.max_consecutive_nonfinite",
    "train.barrier_seconds": "train.barrier_timeout_seconds",
    "train.watchdog_seconds": "train.watchdog_timeout_seconds",
}
# {"unroll": ("compute.unroll", "scan_unroll"), ...}: a section of a ConfigDict does not know its own name. No two
# sections may share a former name.
_BY_LAST_PART = {}
for _old, _new in RENAMED.items():
    _BY_LAST_PART[_old.rpartition(".")[2]] = (_old, _new.rpartition(".")[2])


class UnknownKeyError(KeyError):
    """A ConfigDict has no field `name`. The KeyError of ml_collections would show the whole section."""

    def __init__(self, name: object) -> None:
        super().__init__(f"no such config field: {name}")
        self.name = str(name)


def current_name(path: str) -> str:
    """Returns the dotted name of a field, which may be given by its former name; warns about that once."""
    if path in RENAMED:
        _warn(path)
    return RENAMED.get(path, path)


def rename_fields(values: Any, *, warn: bool) -> Any:
    """Returns nested config `values` with current field names. A value under the current name wins.

    values: a mapping; anything else is returned unchanged, for the caller to reject.
    warn: whether to warn once about each former name.
    """
    if not isinstance(values, Mapping):
        return values
    found = dict(values)
    for old, new in RENAMED.items():
        section, name = old.split(".")
        current = new.split(".")[1]
        fields = found.get(section)
        if not isinstance(fields, Mapping) or name not in fields:
            continue
        fields = dict(fields)  # the caller's mapping stays as it is
        former_value = fields.pop(name)
        fields.setdefault(current, former_value)
        found[section] = fields
        if warn:
            _warn(old)
    return found


def make_config_dict(values: Mapping[str, Any]) -> Any:
    """Returns `values` as a locked ConfigDict, in which former names refer to the current fields."""
    from ml_collections import ConfigDict  # here, so that this module needs the standard library only

    class FormerNames(ConfigDict):
        """A ConfigDict whose fields can be read and assigned by their former names."""

        def __getitem__(self, key: str) -> Any:
            try:
                return super().__getitem__(_translate(key))
            except KeyError as error:
                raise UnknownKeyError(key) from error

        def __setitem__(self, key: str, value: Any) -> None:
            try:
                super().__setitem__(_translate(key), value)
            except KeyError as error:  # the dict is locked
                raise UnknownKeyError(key) from error

    config = FormerNames()
    for name, value in values.items():
        config[name] = FormerNames(value) if isinstance(value, dict) else value
    config.lock()
    return config


def _translate(key: str) -> str:
    if key not in _BY_LAST_PART:
        return key
    old, new = _BY_LAST_PART[key]
    _warn(old)
    return new


@functools.cache
def _warn(old: str) -> None:
    log.warning("%s is now %s; the former name still works", old, RENAMED[old])
