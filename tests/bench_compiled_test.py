"""benchmarks/bench_compiled.py and bench_gap.py read what compilers and profilers write."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import bench_compiled, bench_gap, imagenet_step
from wkd_jax import losses

PROGRAM = """
HloModule jit_f

%fused_add (p: f32[4,2]) -> f32[4,2] {
  %p = f32[4,2]{1,0} parameter(0)
  ROOT %add = f32[4,2]{1,0} add(%p, %p)
}

%body (t: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %t = (s32[], f32[4,2]{1,0}) parameter(0)
  %x = f32[4,2]{1,0} get-tuple-element(%t), index=1
  %y = f32[4,2]{1,0} fusion(%x), kind=kLoop, calls=%fused_add
  ROOT %out = (s32[], f32[4,2]{1,0}) tuple(%i, %y)
}

ENTRY %main (a: bf16[3,5], b: f32[4,2]) -> f32[4,2] {
  %a = bf16[3,5]{1,0} parameter(0)
  %b = f32[4,2]{1,0} parameter(1)
  %conv = (bf16[3,7]{1,0}, u8[0]{0}) custom-call(%a), custom_call_target="__cudnn$convForward", metadata={name="(%b)"}
  %loop = (s32[], f32[4,2]{1,0}) while(%b), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %last = f32[4,2]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_kernels_of_a_program_and_what_they_move():
    found = bench_compiled.kernels(PROGRAM)
    assert found == [("custom-call __cudnn$convForward", 2 * (15 + 21)), *[("fusion kLoop", 2 * 32)] * 3]


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="loop: a loop of unknown length"):
        bench_compiled.kernels(PROGRAM.replace("known_trip_count", "other"))


def test_a_branch_is_an_error():
    with pytest.raises(ValueError, match="loop: a call is not counted"):
        bench_compiled.kernels(PROGRAM.replace("while(%b)", "call(%b)"))


def test_the_solvers_products_are_those_that_xla_counts():
    def loss(student, teacher, labels, cost):
        _, wasserstein, error = losses.wkd_logit(student, teacher, labels, cost, return_error=True)
        return wasserstein.sum(), error

    rows, classes = 256, 1000
    logits, cost = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, classes), (classes, classes)))
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    lowered = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(logits, logits, labels, cost)
    assert lowered.cost_analysis()["flops"] / 1e12 == pytest.approx(
        bench_compiled.solver_tflop(rows, classes), rel=0.01
    )


def test_the_step_of_a_pair_is_planned_without_arrays():
    settings = imagenet_step.config("r34_r18", {"wkd_l": {}, "wkd_f": {}}, batch=8)
    plan = imagenet_step.planned(settings, imagenet_step.ImageNet())
    assert plan.parameters["methods"] == 854_016
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((plan.state, plan.frozen)))
    assert imagenet_step.planned(imagenet_step.config("r34_r18", {"none": {}}, batch=8), plan.data).teacher is None


def test_a_directory_without_a_trace_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds 0 traces"):
        bench_gap.programs(tmp_path)
