"""What the formulas say of a small model, counted here once more by hand."""

import dataclasses

import jax.numpy as jnp
import pytest

from gptjax.collectives import Parallel
from gptjax.compute import ResolvedCompute
from gptjax.config import from_dict
from gptjax.plan.estimate import (
    Candidate,
    Efficiency,
    Roofline,
    StepLayout,
    estimate_memory,
    hierarchical_all_reduce,
    minimum_traffic,
    roofline,
    step_flops,
)
from gptjax.plan.search import param_shapes
from gptjax.plan.topology import parse_topology
from gptjax.sizes import train_flops_per_token

L, D, T, V = 2, 64, 128, 256
MATRICES = 12 * L * D * D  # the layers' weights
VECTORS = L * (9 * D + 4 * D) + 2 * D  # biases and LayerNorms, which lie whole on every device
TABLES = (V + T) * D


def setting_of(
    data=1, fsdp=1, tensor=1, *, num_microbatches=1, micro_batch=2, slices=1, remat="none", dtype=jnp.bfloat16
):
    model = {"n_layer": L, "n_head": 4, "n_embd": D, "block_size": T, "vocab_size": V}
    batch = num_microbatches * micro_batch * data * fsdp
    config = from_dict({"model": model, "data": {"global_batch_size": batch}, "compute": {"remat": remat}})
    compute, parallel = ResolvedCompute(remat=remat, dtype=dtype), Parallel(dtype=dtype, reduce_dtype=dtype)
    shape = StepLayout({"data": data, "fsdp": fsdp, "tensor": tensor}, num_microbatches, micro_batch, slices)
    return Candidate(config, compute, parallel, shape, param_shapes(config))


def test_typical_step_adds_computation_and_the_exposed_communication():
    half = Efficiency(matrix_units=0.5, memory=0.25, links=0.5, network=0.2, exposed_communication=0.1)
    assert half.seconds(Roofline(1.0, 2.0, 3.0, 4.0)) == pytest.approx(1 / 0.5 + 2 / 0.25 + 0.1 * (3 / 0.5 + 4 / 0.2))


def test_one_device_sends_nothing():
    assert minimum_traffic(setting_of()) == {}


def test_data_parallelism_sums_every_gradient_once():
    traffic = minimum_traffic(setting_of(data=4, num_microbatches=3))
    ring = 2 * 3 / 4
    assert traffic == {("all-reduce", ("data",)): pytest.approx(ring * (2 * (MATRICES + VECTORS) + 4 * TABLES))}


def test_gradients_travel_in_the_reduce_dtype():
    setting = setting_of(data=4)
    setting = dataclasses.replace(setting, parallel=dataclasses.replace(setting.parallel, reduce_dtype=jnp.float32))
    sent = pytest.approx(1.5 * 4 * (MATRICES + VECTORS + TABLES))
    assert minimum_traffic(setting) == {("all-reduce", ("data",)): sent}


@pytest.mark.parametrize("fsdp", [1, 4])
def test_gradients_of_tables_travel_in_their_reduce_dtype(fsdp):
    setting = setting_of(data=4, fsdp=fsdp)
    parallel = dataclasses.replace(setting.parallel, table_reduce_dtype=jnp.bfloat16)
    found = minimum_traffic(dataclasses.replace(setting, parallel=parallel))
    before = minimum_traffic(setting)
    saved = {key: before[key] - found[key] for key in before if before[key] != found[key]}
    scattered = {("reduce-scatter", ("fsdp",)): pytest.approx(3 / 4 * 2 * TABLES)} if fsdp > 1 else {}
    assert saved == scattered | {("all-reduce", ("data",)): pytest.approx(1.5 * 2 * TABLES / fsdp)}


def test_fsdp_gathers_twice_and_scatters_once_per_micro_batch():
    traffic = minimum_traffic(setting_of(fsdp=4, num_microbatches=3))
    part = 3 / 4
    assert traffic["all-gather", ("fsdp",)] == pytest.approx(part * (3 * 2 * 2 * MATRICES + 2 * TABLES))
    assert traffic["reduce-scatter", ("fsdp",)] == pytest.approx(part * (3 * 2 * MATRICES + 4 * TABLES))
    assert traffic["all-reduce", ("fsdp",)] == pytest.approx(2 * part * 2 * VECTORS)
    assert len(traffic) == 3


def test_fsdp_with_data_all_reduces_the_scattered_gradients():
    traffic = minimum_traffic(setting_of(data=2, fsdp=4))
    assert traffic["all-reduce", ("data",)] == pytest.approx(2 * (2 * MATRICES + 4 * TABLES) / 4 / 2)
    assert traffic["all-reduce", ("data", "fsdp")] == pytest.approx(2 * 2 * VECTORS * 7 / 8)


def test_slices_all_reduce_each_part_once_over_dcn():
    traffic = minimum_traffic(setting_of(data=4, fsdp=2, slices=2))
    assert {key for key in traffic if "data" in key[1]} == {
        ("all-reduce", ("data",)), ("all-reduce", ("data", "fsdp")), ("all-reduce (DCN)", ("data",))
    }  # fmt: skip
    reduced = 2 * MATRICES + 4 * TABLES
    assert traffic["all-reduce (DCN)", ("data",)] == pytest.approx(reduced / 2 / 2 + 2 * VECTORS / 4)
    flat = minimum_traffic(setting_of(data=4, fsdp=2))
    assert sum(traffic.values()) == pytest.approx(sum(flat.values())), "in all the same as by one ring"


def test_single_device_per_slice_needs_only_dcn_traffic():
    shape = StepLayout({"data": 2, "fsdp": 4, "tensor": 1}, 1, 1, slices=2)
    assert hierarchical_all_reduce(shape, ("data",), 100.0) == {("all-reduce (DCN)", ("data",)): 100.0}
    one_slice = dataclasses.replace(shape, slices=1)
    assert hierarchical_all_reduce(one_slice, ("data",), 100.0) == {("all-reduce", ("data",)): 100.0}


def test_tensor_parallelism_gathers_positions_and_scatters_sums():
    """Twice a layer forward and twice backward, once for lookup and head each way; what lies whole is summed."""
    alone = minimum_traffic(setting_of(tensor=4, num_microbatches=3))
    sent = 3 * 2 * T * D * 2 * 3 / 4
    assert alone["all-gather", ("tensor",)] == alone["reduce-scatter", ("tensor",)] == (4 * L + 2) * sent
    whole = 2 * (L * 6 * D + 2 * D) + 4 * T * D  # two LayerNorms and two biases a layer, the last norm; positions
    assert alone["all-reduce", ("tensor",)] == pytest.approx(2 * whole * 3 / 4)
    again = minimum_traffic(setting_of(tensor=4, num_microbatches=3, remat="full"))
    assert again["all-gather", ("tensor",)] == (6 * L + 2) * sent
    assert again["reduce-scatter", ("tensor",)] == (5 * L + 2) * sent


def test_gradients_not_cut_by_tensor_are_reduced_over_it():
    traffic = minimum_traffic(setting_of(data=2, fsdp=2, tensor=2))
    assert traffic["all-reduce", ("data", "tensor")] == pytest.approx(2 * 4 * T * D / 2 * 3 / 4), "positions"
    assert traffic["all-reduce", ("data", "fsdp", "tensor")] == pytest.approx(2 * 2 * (L * 6 * D + 2 * D) * 7 / 8)
    assert traffic["all-reduce", ("data", "fsdp")] == pytest.approx(2 * 2 * L * 7 * D / 2 * 3 / 4), "cut biases"


def test_memory_is_cut_by_the_mesh():
    whole, cut = estimate_memory(setting_of()), estimate_memory(setting_of(fsdp=4))
    assert whole["parameters"] == 4 * (MATRICES + VECTORS + TABLES)
    assert whole["optimizer"] == 2 * whole["parameters"]
    assert cut["parameters"] == MATRICES + TABLES + 4 * VECTORS
    assert cut["activations"] == whole["activations"]
    assert estimate_memory(setting_of(micro_batch=8))["activations"] == 4 * whole["activations"]
    assert estimate_memory(setting_of(remat="full"))["activations"] < whole["activations"]


def test_memory_counts_the_average():
    plain = setting_of()
    config = dataclasses.replace(plain.config, optim=dataclasses.replace(plain.config.optim, ema_decay=0.99))
    averaged = estimate_memory(dataclasses.replace(plain, config=config))
    assert averaged["optimizer"] == 3 * averaged["parameters"]
    assert averaged["parameters"] == estimate_memory(plain)["parameters"]


def test_roofline_names_the_limiting_resource():
    chip = parse_topology("v5e:2x2", 1).chip
    setting = setting_of(data=2, micro_batch=64)
    seconds = step_flops(setting.config) / 2 / chip.peak_flops
    assert step_flops(setting.config) == 128 * T * train_flops_per_token(setting.config.model)
    assert roofline(setting, chip, {}).matrix_units == pytest.approx(seconds)
    again = setting_of(data=2, micro_batch=64, remat="full")
    assert roofline(again, chip, {}).matrix_units == pytest.approx(seconds * 4 / 3)
    slow = roofline(setting, chip, {("all-reduce", ("data",)): 1e12})
    assert (slow.bound, slow.network) == ("links", 0)
    assert slow.seconds == pytest.approx(1e12 / (2 * chip.link_bandwidth))


def test_roofline_counts_only_dcn_traffic_as_network():
    chip = parse_topology("v5e:2x2", 2).chip
    traffic = {("all-reduce (DCN)", ("data",)): 1e9, ("all-gather", ("fsdp",)): 2e9}
    roof = roofline(setting_of(data=2, fsdp=2, slices=2), chip, traffic)
    assert roof.network == pytest.approx(1e9 / chip.network_bandwidth)
    assert roof.links == pytest.approx(2e9 / (2 * chip.link_bandwidth))
    assert dataclasses.asdict(roof)[roof.bound] == roof.seconds
