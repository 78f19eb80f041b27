"""The data of a run: one directory of shards or a mixture of several, and what identifies them."""

import logging
import os
from collections.abc import Sequence

from gptjax.config import Config
from gptjax.data.dataset import Dataset, source_seed
from gptjax.data.mixture import Mixture
from gptjax.data.own_tokenizer import is_own, open_data_tokenizer
from gptjax.data.prepare import default_path, ensure_prepared
from gptjax.data.readers import Reading
from gptjax.data.sources import needs_network
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokens import open_split
from gptjax.errors import ConfigError, DataError
from gptjax.mix import parse_mix, write_mix


def identify(config: Config, train_data: Dataset | Mixture) -> dict[str, str | int]:
    """Returns what determines the batches, for Run.data_identity."""
    identity: dict[str, str | int] = {
        "fingerprint": train_data.fingerprint,
        "data.seed": config.data.seed,
        "data.global_batch_size": config.data.global_batch_size,
        "model.block_size": config.model.block_size,
    }
    if isinstance(train_data, Mixture) and len(train_data.datasets) > 1:
        # By number: a directory may be moved or renamed.
        identity["data.mix weights"] = ":".join(map(str, train_data.weights))
        for number, dataset in enumerate(train_data.datasets, 1):
            identity[f"fingerprint of source {number}"] = dataset.fingerprint
    return identity


def open_tokenizer_of(config: Config) -> Tokenizer:
    """Returns data.tokenizer. One of the data's own is read from them, or trained as they will be prepared.

    Raises:
        ConfigError: there is no such tokenizer; or the data are missing, and cannot be prepared without a command.
        UserError: as `open_data_tokenizer`.
    """
    data = config.data
    name = data.tokenizer
    directory = data.path or default_path(data.source, name)
    if data.mix:  # its parts have the same tokenizer
        directory = os.path.expanduser(parse_mix(data.mix)[0].directory)
    elif is_own(name) and (data.path or needs_network(data.source)):
        ensure_prepared(data)  # refuses where they are missing, before their source is read
    return open_data_tokenizer(
        name,
        directory,
        source=data.source,
        share=data.val_fraction,
        reading=Reading(text_feature=data.text_feature),
        log=logging.getLogger("gptjax").info,
    )


def open_data(
    config: Config, tokenizer: Tokenizer
) -> tuple[Dataset | Mixture, Dataset | Mixture, dict[str, str | int]]:
    """Returns the data to train on, the data to validate on, and Run.data_location.

    Raises:
        ConfigError: the data are missing, and cannot be prepared without a command.
        DataError: they are damaged, or made with another tokenizer.
    """
    parts = parse_mix(config.data.mix) if config.data.mix else ()
    for part in parts:
        if not os.path.isdir(os.path.expanduser(part.directory)):
            raise ConfigError(
                f"no data in {part.directory}",
                field="data.mix",
                value=config.data.mix,
                remedy="correct it, or prepare them: "
                f"gptjax prepare --source=... --tokenizer={config.data.tokenizer} --out={part.directory}",
            )
    directories = [os.path.expanduser(part.directory) for part in parts]
    if not parts:
        directories = [ensure_prepared(config.data, tokenizer, window=config.model.block_size + 1)]
    opened: list[Dataset | Mixture] = []
    for split in ("train", "validation"):
        datasets = [
            open_dataset(config, directory, split, tokenizer=tokenizer, source=number)
            for number, directory in enumerate(directories)
        ]
        _check_same_eot(datasets)
        if not parts:
            opened += datasets
            continue
        names, weights = zip(*((part.name, part.weight) for part in parts), strict=True)
        opened.append(Mixture(names, weights, tuple(datasets)))
    train_data, validation_data = opened
    location: dict[str, str | int] = {
        "directory": ", ".join(map(os.path.abspath, directories)),
        "tokens": train_data.tokens,
    }
    if parts:
        location["mix"] = write_mix(parts)
    return train_data, validation_data, location


def open_validation_data(
    config: Config, directory: str, *, tokenizer: Tokenizer, instead_of: Dataset | Mixture
) -> Dataset:
    """Returns the validation data in a directory, for a step that was made for other data.

    Raises:
        DataError: they are missing, damaged, made with another tokenizer, or their documents end in another way.
    """
    data = open_dataset(config, directory, "validation", tokenizer=tokenizer)
    [(_, _, first), *_] = instead_of.sources()
    _check_same_eot([first, data])
    return data


def _check_same_eot(datasets: Sequence[Dataset]) -> None:
    """Checks that documents begin or end with the same token in all data of a mixture, as the compiled step assumes."""
    for dataset in datasets:
        if dataset.eot != datasets[0].eot:
            raise DataError(
                f"has end-of-text {dataset.eot}, and the data before it have {datasets[0].eot}",
                field=os.path.dirname(dataset.split.paths[0]),
                remedy="set data.eot_position if it was guessed wrongly, or prepare them in the same way",
            )


def open_dataset(config: Config, directory: str, name: str, *, tokenizer: Tokenizer, source: int = 0) -> Dataset:
    """Returns the dataset of the split `name` (train or validation) in `directory`, in batches as `config` sets them.

    source: the number of this source of a mixture. Each has its own order; that of the first is the order without one.

    Raises:
        DataError: it is missing, damaged, or made with another tokenizer.
    """
    split = open_split(directory, name, tokenizer=tokenizer, eot_position=config.data.eot_position)
    seed = config.data.seed if source == 0 else source_seed(config.data.seed, source)
    return Dataset(split, config.model.block_size, config.data.global_batch_size, seed)


def describe_sources(data: Dataset | Mixture) -> list[str]:
    """Returns a line for each source of a mixture."""
    return [
        f"  {name}: {100 * share:.4g} % of the sequences, {dataset.tokens:,} tokens"
        for name, share, dataset in data.sources()
        if name
    ]
