"""The results in a directory as short tables, in the order in which they were measured.

python benchmarks/summary.py benchmarks/results
"""

import json
import pathlib
import sys

import bench


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/summary.py DIRECTORY")
    files = sorted(pathlib.Path(sys.argv[1]).glob("*.json"), key=lambda path: path.stat().st_mtime)
    results = [json.loads(path.read_text()) for path in files]
    machine = {}
    for result in (one for one in results if one.get("rows")):
        found = {name: value for name, value in result["machine"].items() if name not in ("time", "load", "seed")}
        if found != machine:
            machine = found
            print(", ".join(f"{name} {value}" for name, value in machine.items()))
        print(f"\n{result['benchmark']}\n{bench.table(result['rows'])}")


if __name__ == "__main__":
    main()
