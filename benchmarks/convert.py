"""How long a conversion takes and how much memory, and how soon a model that was not converted answers.

    python benchmarks/convert.py [--sizes=small,xl] [--repeat=3]

Each conversion is the command in a process of its own, on random weights in float32. "own work" is what the command
says it took after its start-up: reading, writing, and reading the result back. "peak" is the most resident memory,
also as a multiple of the model's bytes. "first letter" is from the start of `gptjax.sample --model=hf:DIR` to the
first letter after the prompt. XL takes 20 GB of disk.
"""

import argparse
import math
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import bench
import numpy as np

from gptjax.config import GPTConfig
from gptjax.convert import huggingface, names
from gptjax.convert.weights import DTYPES, Tensor, make_weights
from gptjax.data.tokenizer import load_tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}
PROMPT = "The meaning of life"
RANDOM_VALUES = 2**24  # which are repeated


def write_model(directory: str, size: str) -> int:
    """Writes random weights in Hugging Face's form with GPT-2's tokenizer; returns the bytes of the weights."""
    n_layer, n_head, n_embd = SIZES[size]
    config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    shapes = names.shapes(config)
    values = (0.02 * np.random.default_rng(0).standard_normal(RANDOM_VALUES)).astype(np.float32)
    tensors = {name: Tensor(shape, DTYPES["float32"], lambda: values, name) for name, shape in shapes.items()}
    weights = make_weights("random", config, tensors, tokenizer=load_tokenizer("gpt2"))

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for row in names.rows(config):
            for _, name in names.layers(row, config):
                yield name, np.resize(values, shapes[name])

    os.makedirs(directory)
    huggingface.write(directory, weights, read(), dtype="float32")
    return 4 * sum(math.prod(shape) for shape in shapes.values())


def convert(source: str, target: str) -> tuple[float, float, int]:
    """Returns (seconds of own work, seconds in all, peak resident bytes) of one conversion."""
    command = [sys.executable, "-m", "gptjax.convert", f"--from={source}", f"--to={target}"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    own = re.search(r"done in ([\d.]+) s", said)
    if process.returncode or own is None:
        raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}\n{said}")
    return float(own[1]), time.perf_counter() - start, usage.ru_maxrss * 1024


def first_letter(model: str, cache: str) -> float:
    """Returns the seconds from the start of the command to the first letter after the prompt."""
    command = [sys.executable, "-m", "gptjax.sample", f"--model={model}", f"--prompt={PROMPT}", "--max_new_tokens=20"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None
        while PROMPT.encode() not in (said := os.read(process.stdout.fileno(), 4096)):
            if not said:
                raise SystemExit(f"{' '.join(command)}: ended without an answer")
        while not process.stdout.read(1):
            pass
        seconds = time.perf_counter() - start
        process.kill()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small,xl")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    machine, found = bench.machine(), []
    print(f"{'size':7} {'conversion':18} {'own work':>9} {'in all':>9} {'peak':>8} {'peak / model':>12}")
    for size in args.sizes.split(","):
        with tempfile.TemporaryDirectory() as place:
            model_bytes = write_model(f"{place}/hf", size)
            routes = [(f"hf:{place}/hf", f"gptjax:{place}/run"), (f"gptjax:{place}/run", f"hf:{place}/out")]
            routes += [(f"hf:{place}/hf", f"llmc:{place}/out.bin"), (f"llmc:{place}/out.bin", f"hf:{place}/out")]
            for source, target in routes:
                rows = []
                for _ in range(args.repeat):
                    path = target.partition(":")[2]
                    shutil.rmtree(path, ignore_errors=True)
                    pathlib.Path(path).unlink(missing_ok=True)
                    rows.append(convert(source, target))
                own, total, peak = (statistics.median(column) for column in zip(*rows, strict=True))
                name = f"{source.partition(':')[0]} -> {target.partition(':')[0]}"
                row = {"size": size, "conversion": name, "own work s": own, "in all s": total}
                found.append(row | {"peak GB": peak / 1e9, "peak / model": peak / model_bytes})
                print(
                    f"{size:7} {name:18} {own:7.1f} s {total:7.1f} s {peak / 1e9:5.2f} GB {peak / model_bytes:10.2f} x",
                    flush=True,
                )
            if size == "small":
                seconds = [first_letter(f"hf:{place}/hf", f"{place}/cache") for _ in range(args.repeat + 1)]
                print(f"{size:7} first letter: {seconds[0]:.1f} s with a cold compile cache, ", end="")
                print(f"{statistics.median(seconds[1:]):.1f} s with a warm one", flush=True)
                found.append({"size": size, "conversion": "none: first letter, cold", "in all s": seconds[0]})
                warm = statistics.median(seconds[1:])
                found.append({"size": size, "conversion": "none: first letter, warm", "in all s": warm})
    print(bench.write("convert", found, machine, args.out))


if __name__ == "__main__":
    main()
