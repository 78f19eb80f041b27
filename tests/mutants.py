"""Mutants: one mechanism at a time is taken out of a copy of the tree, and a test must fail.

    python -m tests.mutants [--only=NAME,...] [--markdown=FILE] [--list]

It prints a row per mutant with the test that failed, and ends with 1 where none did. A mutant is a change of one piece
of text; tests/test_mutants.py checks that each piece still exists. All take a quarter of an hour on two cores.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds; a mutant may make a test hang, and that test has then noticed it
COPIED = ("gptjax", "tests", "configs", "benchmarks", "docs", "launch", "notebooks", "pyproject.toml", "README.md")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A mechanism, and the change that takes it out."""

    name: str
    mechanism: str  # in words, as in docs/reliability.md
    file: str  # relative to the repository
    old: str  # occurs once in `file`
    new: str
    tests: str  # arguments of pytest: files and -k


MUTANTS: tuple[Mutant, ...] = (
    # The model and its numbers.
    Mutant("causal-mask", "attention sees no later position", "gptjax/attention.py",
           "jnp.tril(all_keys, start)",
           "jnp.tril(all_keys, start + 1)",
           "tests/test_attention.py tests/test_model.py"),
    Mutant("attention-scale", "scores are divided by the root of the head width", "gptjax/attention.py",
           "scale = 1 / math.sqrt(q_BNTH.shape[-1])",
           "scale = 1 / q_BNTH.shape[-1]",
           "tests/test_model.py"),
    Mutant("gelu-backward", "the gradient of GELU that only its input is kept for", "gptjax/kernels/pointwise.py",
           "1 + 3 * CUBIC * x**2",
           "1 + 2 * CUBIC * x**2",
           "tests/kernels/test_pointwise.py tests/test_model.py"),
    Mutant("exact-gelu", "nanoGPT's activation is the exact form of GELU", "gptjax/kernels/pointwise.py",
           "jax.nn.gelu(wide, approximate=approximate)",
           "jax.nn.gelu(wide, approximate=True)",
           "tests/kernels/test_pointwise.py"),
    Mutant("exact-gelu-backward", "the exact form of GELU has a gradient of its own", "gptjax/kernels/pointwise.py",
           "return distribution + x * density",
           "return distribution",
           "tests/kernels/test_pointwise.py"),
    Mutant("residual-scale", "residual projections start smaller by the root of twice the layers", "gptjax/model.py",
           "INIT_STD / math.sqrt(2 * config.n_layer)",
           "INIT_STD",
           "tests/test_model.py"),
    Mutant("document-positions", "positions start again at each document", "gptjax/examples.py",
           "return position_BT - jax.lax.cummax(started_BT, axis=1)",
           "return position_BT",
           "tests/test_model.py"),
    Mutant("dropout-scale", "what dropout keeps is scaled up", "gptjax/dropout.py",
           "scaled_BTD = x_BTD / (1 - rate)",
           "scaled_BTD = x_BTD",
           "tests/test_model.py"),
    Mutant("padded-logits", "padded columns of the head take no part in the loss", "gptjax/loss.py",
           "if padded_size == vocab_size:",
           "if padded_size >= vocab_size:",
           "tests/test_loss.py tests/test_model.py"),
    Mutant("target-weight", "negative targets do not count", "gptjax/loss.py",
           "weight_BT = counted_BT.astype(jnp.float32)",
           "weight_BT = jnp.ones_like(counted_BT, jnp.float32)",
           "tests/test_loss.py tests/test_step.py"),
    # The update.
    Mutant("token-mean", "accumulated gradients are divided by the tokens of all micro-batches", "gptjax/step.py",
           "jax.tree.map(lambda g: g / sums.tokens, grads)",
           "jax.tree.map(lambda g: g / (sums.tokens + 1), grads)",
           "tests/test_step.py"),
    Mutant("clip", "gradients are clipped by their global norm", "gptjax/step.py",
           "g * jnp.minimum(1.0, limit / (norm + 1e-6))",
           "g * jnp.minimum(2.0, limit / (norm + 1e-6))",
           "tests/test_step.py"),
    Mutant("keep-nonfinite", "an update that is not finite leaves parameters and moments as they are", "gptjax/step.py",
           "return jnp.where(condition, n, o)",
           "return jnp.where(True, n, o)",
           "tests/test_step.py"),
    Mutant("microbatch-keys", "each micro-batch has a dropout key of its own", "gptjax/step.py",
           "jax.random.fold_in(step_key, index)",
           "jax.random.fold_in(step_key, 0 * index)",
           "tests/test_step.py tests/test_model.py tests/test_sharding.py"),
    Mutant("weight-decay", "weight decay leaves biases and LayerNorms out", "gptjax/optim.py",
           "return _by_path(params, lambda path: find(path).decays)",
           "return _by_path(params, lambda path: True)",
           "tests/test_optim.py"),
    Mutant("warmup", "the first update has a learning rate above 0", "gptjax/optim.py",
           "peak * (t + 1) / (warmup + 1)",
           "peak * t / (warmup + 1)",
           "tests/test_optim.py"),
    # Parallelism.
    Mutant("all-reduce", "gradients are summed over the axes that do not shard them", "gptjax/collectives.py",
           "return jax.lax.psum(g.astype(dtype), axes).astype(g.dtype)",
           "return g",
           "tests/test_sharding.py"),
    Mutant("vocabulary-shard", "each shard of the vocabulary knows its first token id", "gptjax/loss.py",
           "return column_BTV + tensor_parallel_index(parallel) * logits_BTV.shape[2]",
           "return column_BTV",
           "tests/test_sharding.py"),
    Mutant("dropout-rows", "dropout masks are the same on every mesh", "gptjax/dropout.py",
           "row += jnp.uint32(data_parallel_index(parallel) * shape[0])",
           "row += jnp.uint32(0)",
           "tests/test_sharding.py"),
    Mutant("gather-stages", "an all-gather takes the stages of the reduce-scatter in reverse", "gptjax/collectives.py",
           "for groups in reversed(stages):",
           "for groups in stages:",
           "tests/test_sharding.py"),
    # Generation.
    Mutant("cache-mask", "stale entries of a cache are hidden", "gptjax/kv_cache.py",
           "mask = key_positions <= query_positions",
           "mask = key_positions <= query_positions + 1",
           "tests/test_generate.py"),
    # Data.
    Mutant("epoch-seed", "every epoch has an order of its own", "gptjax/data/dataset.py",
           'f"{seed}/{epoch}"',
           'f"{seed}/{0 * epoch}"',
           "tests/data/test_dataset.py"),
    Mutant("validation-once", "a validation window is read once", "gptjax/data/dataset.py",
           "is_window = samples < self.num_windows",
           "is_window = samples <= self.num_windows",
           "tests/data/test_dataset.py"),
    Mutant("changed-shard", "a shard that was replaced is compared with what was checked", "gptjax/data/shards.py",
           "return hash_whole(shard.path, descriptor) == shard.sha256",
           "return True",
           "tests/data/test_shards.py"),
    Mutant("id-bounds", "ids beyond the vocabulary are found", "gptjax/data/tokens.py",
           "if ids.max() >= vocab_size:",
           "if ids.max() > vocab_size:",
           "tests/data/test_tokens.py"),
    Mutant("long-blanks", "a million blanks are cut before tiktoken has them", "gptjax/data/patterns.py",
           "if end - start >= LONG:",
           "if end - start >= 10**9:",
           "tests/data/test_patterns.py -k z2"),
    Mutant("panics", "a panic of tiktoken's becomes an error with a message", "gptjax/data/patterns.py",
           'if type(error).__name__ == "PanicException":',
           'if type(error).__name__ == "NoException":',
           "tests/data/test_patterns.py"),
    # Checkpoints.
    Mutant("fingerprints", "restored arrays are compared with the record", "gptjax/checkpoint.py",
           "wrong = [name for name, value in found.items() if record.fingerprints.get(name) != value]",
           "wrong: list[str] = []",
           "tests/faults/test_damage.py -k c2"),
    Mutant("record-checksum", "a record carries its checksum", "gptjax/record.py",
           'if hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:',
           "if False:",
           "tests/test_checkpoint.py"),
    Mutant("not-now", "a checkpoint that cannot be read for the moment keeps its name", "gptjax/record.py",
           'return "" if number in DAMAGE else os.strerror(number)',
           'return ""',
           "tests/faults/test_damage.py tests/test_checkpoint.py -k c6"),
    Mutant("nonfinite-state", "a state that is not finite is never saved", "gptjax/checkpoint.py",
           "        refuse_nonfinite(trees, step)\n",
           "        pass\n",
           "tests/test_checkpoint.py -k nonfinite_state"),
    Mutant("save-again", "each attempt to save gives Orbax a dict of its own", "gptjax/checkpoint.py",
           "dict(trees),",
           "trees,",
           "tests/test_checkpoint.py"),
    Mutant("sync", "a save is on disk before it has its name", "gptjax/orbax_context.py",
           "sync_tree(self._temporary)",
           "pass",
           "tests/test_checkpoint.py -k d5"),
    Mutant("run-id", "a checkpoint of another run is refused", "gptjax/identity.py",
           "return checkpoint_id == self.run_id",
           "return True",
           "tests/faults/test_identity.py"),
    # A run.
    Mutant("spike-window", "a small rise of a loss near zero is no spike", "gptjax/divergence.py",
           "sigma = max(math.sqrt(variance), RELATIVE_FLOOR * abs(mean), ABSOLUTE_FLOOR)",
           "sigma = max(math.sqrt(variance), RELATIVE_FLOOR * abs(mean))",
           "tests/test_divergence.py"),
    Mutant("rollback-data", "the batches up to the spike are left out after a rollback", "gptjax/divergence.py",
           "batches=last - first + 1,",
           "batches=last - first,",
           "tests/test_divergence.py"),
    Mutant("second-signal", "a second SIGTERM or Ctrl-C leaves at once", "gptjax/signals.py",
           "                if number in EXITS_AT_ONCE:\n",
           "                if False:\n",
           "tests/test_signals.py"),
    Mutant("stopped-time", "time in which a process was stopped does not count for the watchdog", "gptjax/signals.py",
           "min(now - before, 2 * tick)",
           "now - before",
           "tests/test_signals.py"),
    Mutant("lock-taken", "a second trainer in one work directory is refused", "gptjax/workdir.py",
           "fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB",
           "fcntl.LOCK_SH if wait else fcntl.LOCK_SH | fcntl.LOCK_NB",
           "tests/test_workdir.py tests/faults/test_workdir.py"),
    Mutant("links", "no file of a run is written through a link", "gptjax/workdir.py",
           "flags | os.O_NOFOLLOW | os.O_NONBLOCK",
           "flags | os.O_NONBLOCK",
           "tests/test_workdir.py"),
    Mutant("refused-run", "a refused run leaves nothing behind", "gptjax/workdir.py",
           "lock.remove_made()",
           "pass",
           "tests/faults/test_streams.py -k b3"),
    Mutant("lost-peer", "a process that dies is named in all others", "gptjax/peers.py",
           "if peer.number is not None and not peer.has_left:",
           "if False:",
           "tests/test_peers.py"),
    Mutant("peer-token", "a stranger's connection is hung up on", "gptjax/peers.py",
           'if not hmac.compare_digest(str(message["token"]), self._token):',
           "if False:",
           "tests/test_peers.py"),
    Mutant("cut-log", "metrics.jsonl is truncated behind the restored step", "gptjax/logs.py",
           "            file.truncate()\n",
           "            pass\n",
           "tests/test_logs.py"),
    Mutant("log-kept", "lines that could not be written are written later", "gptjax/logs.py",
           "self._kept = (self._kept + data)[-LARGEST_BACKLOG:]",
           "self._kept = data[-LARGEST_BACKLOG:]",
           "tests/test_logs.py"),
    Mutant("secrets", "no line shows a secret of the environment", "gptjax/redaction.py",
           "text = _hide_short_lines(_hide(text, secret), secret)",
           "pass",
           "tests/faults/test_printed.py tests/test_cli.py"),
    Mutant("json-levels", "JSON that is nested too deep is refused", "gptjax/strict_json.py",
           "if depth > MOST_LEVELS:",
           "if False:",
           "tests/test_strict_json.py"),
    # Conversion.
    Mutant("missing-tensor", "weights that lack a tensor are refused", "gptjax/convert/weights.py",
           "lines.append(_describe_missing(missing[0], extra))",
           "pass",
           "tests/convert/test_weights.py"),
    Mutant("hub-bound", "a server may send no more than it announced", "gptjax/convert/transfer.py",
           "if len(piece) > remaining:",
           "if False:",
           "tests/convert/test_transfer.py"),
)  # fmt: skip


def mutated(mutant: Mutant, source: str) -> str:
    """Returns `source` with the mutant's change; raises ValueError unless its text occurs exactly once."""
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: its text occurs {source.count(mutant.old)} times in {mutant.file}")
    return source.replace(mutant.old, mutant.new)


def run_tests(tree: pathlib.Path, tests: str) -> tuple[bool, str]:
    """Runs tests in `tree`; returns whether all passed, and the first that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *tests.split()]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return False, f"no end after {TIMEOUT} s"
    if done.returncode not in (0, 1):  # nothing was collected, or pytest itself failed
        raise RuntimeError(f"pytest {tests}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return done.returncode == 0, failed[1] if failed else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Run only these mutants, by name, separated by commas.")
    parser.add_argument("--markdown", default="", help="Also write the table to this file.")
    parser.add_argument("--list", action="store_true", help="List the mutants and run nothing.")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not args.only or mutant.name in args.only.split(",")]
    if args.list:
        print("\n".join(f"{mutant.name:<28} {mutant.mechanism}" for mutant in chosen))
        return
    table = ["| mechanism taken out | in | noticed by |", "|---|---|---|"]
    missed = 0
    with tempfile.TemporaryDirectory() as directory:
        tree = pathlib.Path(directory) / "tree"
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            tree.mkdir(exist_ok=True)
            copy(ROOT / name, tree / name)
        for number, mutant in enumerate(chosen, 1):
            begin = time.monotonic()
            file = tree / mutant.file
            source = file.read_text()
            file.write_text(mutated(mutant, source))
            try:
                passed, test = run_tests(tree, mutant.tests)
            finally:
                file.write_text(source)
            missed += passed
            seconds = time.monotonic() - begin
            noticed = "NOT NOTICED" if passed else test
            print(f"{number:>3}/{len(chosen)} {mutant.name:<28} {seconds:>4.0f} s  {noticed}", flush=True)
            table.append(f"| {mutant.mechanism} | `{mutant.file}` | {'**nothing**' if passed else f'`{test}`'} |")
    print(f"{len(chosen) - missed} of {len(chosen)} mutants noticed")
    if args.markdown:
        pathlib.Path(args.markdown).write_text("\n".join(table) + "\n")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
