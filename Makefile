.PHONY: check test lint bench soak

check:  ## everything that CI runs, in fresh environments
	bash .ci/run

test:
	pytest

lint:
	ruff check . && ruff format --check . && basedpyright

soak:  ## hours of faults: kills, flips, fuzz; stop it at any time, it goes on where it was
	python -m tests.faults.soak

bench:
	python benchmarks/train_step.py --cases=toy --steps_per_dispatch=1,100
	python benchmarks/sample.py --batch=1 --prompt=32
	python benchmarks/startup.py
	python benchmarks/data.py
	python benchmarks/checkpoint.py
