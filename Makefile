.PHONY: check test quick lint bench soak notebooks

check:  ## everything that CI runs, in fresh environments
	bash .ci/run

test:
	pytest

quick:  ## what a change of the model or the step breaks first: under a minute on 2 cores
	pytest -q -m "not thorough" tests/test_model.py tests/test_loss.py tests/test_optim.py tests/test_sharding.py tests/test_step.py tests/test_config.py

lint:
	ruff check . && ruff format --check . && basedpyright

notebooks:  ## their outputs, from a run of three minutes on 2 cores
	python notebooks/regenerate.py

soak:  ## hours of faults: kills, flips, fuzz; stop it at any time, it goes on where it was
	pytest -m sweep
	python -m tests.faults.soak

bench:
	python benchmarks/train_step.py --cases=toy --steps_per_dispatch=1,100
	python benchmarks/sample.py --batch=1 --prompt=32
	python benchmarks/startup.py
	python benchmarks/data.py
	python benchmarks/checkpoint.py
