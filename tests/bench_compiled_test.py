"""benchmarks/bench_compiled.py and bench_gap.py read what compilers and profilers write."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import bench_compiled, bench_gap, bench_step, imagenet_step

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


def test_kernels_of_a_compiled_function():
    x = jnp.ones((64, 64))
    text = jax.jit(lambda x: jnp.tanh(x @ x)).lower(x).compile().as_text()
    assert sum(size for _, size in bench_compiled.kernels(text)) >= 2 * x.nbytes


def test_products_are_counted_by_type():
    def run(x, y):
        return x @ x.T, jnp.einsum("bij,bjk->bik", y, y, preferred_element_type=jnp.float32)

    x, y = jax.ShapeDtypeStruct((50, 40), jnp.float32), jax.ShapeDtypeStruct((2, 8, 8), jnp.bfloat16)
    text = jax.jit(run).lower(x, y).as_text()
    assert bench_compiled.float32_products(text) == pytest.approx(2 * 50 * 50 * 40 / 1e12)


def test_the_step_of_a_pair_is_planned_without_arrays():
    settings = imagenet_step.config("r34_r18", {"wkd_l": {}, "wkd_f": {}}, batch=8)
    plan = imagenet_step.planned(settings, imagenet_step.ImageNet())
    assert plan.parameters["methods"] == 854_016
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((plan.state, plan.frozen)))
    assert imagenet_step.planned(imagenet_step.config("r34_r18", {"none": {}}, batch=8), plan.data).teacher is None


def test_a_directory_without_a_trace_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no trace"):
        bench_gap.programs(tmp_path)


def test_the_table_of_a_step_has_one_width():
    row = {"median_ms": 1.0, "quartiles_ms": [0.9, 1.1], "ratio": 1.0, "ratio_quartiles": [1.0, 1.0]}
    row |= {"memory_mb": 10.0, "compile_s": 1.0, "extra_parameters": 0, "utilisation": 0.5}
    assert len({line.count("|") for line in bench_step.table({"kd": row, "wkd_l": row}, "kd").splitlines()}) == 1
