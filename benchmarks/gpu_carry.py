"""What benchmarks/gpu.sh takes along to a machine that has the packages of gpu-image.txt and no network.

    python benchmarks/gpu_carry.py [--out=benchmarks/carry]

Writes OUT/wheels (the packages of gpu-wheels.txt, for Python 3.12 on x86-64) and OUT/data (about 1.5 MB of this
Python's own library, prepared as bytes), together 3.7 MB. Run it where gptjax is installed and pip has an index.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import bench

HERE = pathlib.Path(__file__).resolve().parent
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
TEXT_BYTES = 1.5e6


def fetch_wheels(out: pathlib.Path) -> None:
    platforms = [f"--platform={name}" for name in PLATFORMS]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms,
         "--python-version=3.12", "--implementation=cp", f"--dest={out}", f"--requirement={HERE / 'gpu-wheels.txt'}"],
        check=True,
    )  # fmt: skip


def prepare_data(out: pathlib.Path) -> None:
    from gptjax.data.prepare import prepare
    from gptjax.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        bench.copy_library(pathlib.Path(folder), TEXT_BYTES)
        prepare(source=f"text:{folder}", tokenizer=load_tokenizer("bytes"), out=str(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(HERE / "carry"))
    out = pathlib.Path(parser.parse_args().out)
    fetch_wheels(out / "wheels")
    if not (out / "data").exists():
        prepare_data(out / "data")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
