"""Train GPT-2: python -m gptjax.main --config=configs/quickstart.py [--config.section.field=VALUE ...]

Start the same command again to go on after an interruption. What a config can set: gptjax/config.py.
"""

import gc
import pathlib
import time

from gptjax import config, runtime


def main(arguments: list[str]) -> int:
    started = time.time()
    parser = runtime.Parser(__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="for example configs/quickstart.py")
    parser.add_argument("--workdir", default="", metavar="DIR", help="where the run lives: runs/<config name>")
    parser.add_argument("--coordinator", default="", help="HOST:PORT of process 0, where JAX cannot find it out")
    parser.add_argument("--num_processes", type=int, default=0, help="with --coordinator: how many there are")
    parser.add_argument("--process_id", type=int, default=-1, help="with --coordinator: which one this is, from 0")
    parser.add_argument("--join_seconds", type=float, default=300, help="how long to wait for the other processes")
    args, rest = parser.parse_known_args(arguments)
    settings = config.load(args.config, runtime.parse_overrides(parser, rest))
    runtime.refuse_secrets(config.flatten(settings))
    runtime.start_jax(
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        join_seconds=args.join_seconds,
    )
    from gptjax.train import train  # after the checks above: it takes seconds to import

    gc.freeze()  # modules stay: to look through them again and again takes a tenth of a start
    gc.enable()

    workdir = args.workdir or f"runs/{pathlib.Path(args.config).stem}"
    return train(settings, workdir, started=started)


def cli() -> None:
    gc.disable()  # until all is imported
    runtime.run_cli(main)


if __name__ == "__main__":
    cli()
