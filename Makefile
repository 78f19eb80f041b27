.PHONY: check test lint bench

check:  ## everything that CI runs, in fresh environments
	bash .ci/run

test:
	pytest

lint:
	ruff check . && ruff format --check . && basedpyright

bench:
	python benchmarks/startup.py
	python benchmarks/data.py
	python benchmarks/checkpoint.py
