"""Node tests of the onnx package through the generic lowering: a choice of operators, each as machine code."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import pytest
from onnx.backend.test.case.test_case import TestCase

from nestc.kernels.generic import Generic
from nestc.kernels.testing import host_machine, region_of, run_lowered

CHOSEN = """
test_add test_add_uint8 test_and_bcast4v3d test_argmax_keepdims_example_select_last_index test_batchnorm_epsilon
test_basic_conv_with_padding test_basic_deform_conv_with_padding test_bitshift_right_int8_negative_shift
test_bitcast_float32_to_int32 test_bitcast_bool_to_uint8
test_causal_conv_with_state_silu test_celu test_center_crop_pad_crop_and_pad test_clip_default_int8_inbounds
test_clip_min_greater_than_max test_col2im_5d test_compress_negative_axis test_concat_3d_axis_negative_1
test_conv_with_strides_and_asymmetric_padding test_convinteger_with_padding test_convtranspose_3d
test_convtranspose_autopad_same test_cumprod_1d_exclusive test_cumsum_2d_negative_axis
test_cumsum_1d_reverse_exclusive test_depthtospace_crd_mode_example test_dequantizelinear_axis
test_dequantizelinear_blocked test_det_nd test_dft_inverse test_div_int16 test_dynamicquantizelinear_min_adjusted
test_einsum_batch_diagonal test_elu test_expand_dim_unchanged test_eyelike_with_dtype test_flatten_negative_axis2
test_gather_elements_negative_indices test_gather_negative_indices test_gathernd_example_int32_batch_dim1
test_gelu_tanh_1 test_gemm_all_attributes test_globalmaxpool test_gridsample_bicubic_align_corners_0_additional_1
test_gridsample_reflection_padding test_group_normalization_epsilon test_hannwindow_symmetric
test_hardmax_one_hot test_hardsigmoid test_instancenorm_epsilon test_isinf_positive test_l2normalization_axis_1
test_layer_normalization_3d_axis1_epsilon test_leakyrelu test_linear_attention_gated_delta
test_logsoftmax_large_number test_lppool_2d_dilations test_lrn test_matmul_4d test_matmulinteger test_max_float16
test_maxpool_2d_ceil test_maxpool_with_argmax_2d_precomputed_strides test_maxpool_3d_dilations
test_averagepool_2d_ceil_last_window_starts_on_pad test_averagepool_3d_dilations_large_count_include_pad_is_1_ceil_mode_is_True
test_maxunpool_export_with_output_shape test_mean_example test_mish test_mod_int64_fmod test_mod_mixed_sign_int32
test_mod_mixed_sign_float32 test_mvn test_nllloss_NCd1_mean_weight_negative_ii test_onehot_negative_indices
test_pow_types_int32_float32 test_prelu_broadcast test_qlinearconv test_qlinearmatmul_3D_int8_float16
test_quantizelinear_axis test_quantizelinear_int16 test_range_int32_type_negative_delta
test_reduce_l1_keep_dims_random test_reduce_log_sum_exp_negative_axes_keepdims_random
test_reduce_max_empty_set test_reduce_sum_empty_axes_input_noop test_reflect_pad test_reversesequence_batch
test_rms_normalization_3d_axis1_epsilon test_roialign_aligned_true test_round
test_scatter_elements_with_reduction_min test_scatternd_max test_sce_NCd1d2d3d4d5_mean_weight_log_prob
test_selu test_shrink_soft test_sign test_slice_negative_axes test_softmax_axis_1 test_softplus
test_spacetodepth_crd_mode_example test_split_variable_parts_2d_opset18 test_stft_with_window
test_sub_uint8 test_swiglu test_swish test_tensorscatter_circular test_thresholdedrelu test_tile
test_top_k_negative_axis test_top_k_uint64 test_training_dropout_zero_ratio_mask test_transpose_all_permutations_4
test_tril_zero test_triu_out_pos test_where_long_example test_wrap_pad test_xor_bcast4v2d
""".split()


@cache
def cases() -> dict[str, TestCase]:
    """All node tests of the installed onnx package, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        return {case.name: case for case in load_model_tests(kind="node")}


@pytest.mark.parametrize("name", CHOSEN)
def test_node(name: str) -> None:
    case = cases()[name]
    graph = case.model.graph
    inputs, outputs = case.data_sets[0]
    feeds = {value.name: np.asarray(array) for value, array in zip(graph.input, inputs, strict=True)}
    wanted = {value.name: np.asarray(array) for value, array in zip(graph.output, outputs, strict=True)}
    region = region_of(graph.node, {**feeds, **wanted}, list(wanted))
    machine, generic = host_machine(), Generic()
    assert generic.refusal(region) is None
    results = run_lowered(region, generic.lower(region, machine, {}), feeds, machine)
    for output, want in wanted.items():
        got = results[output]
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        if want.dtype.itemsize == 2 and want.dtype.kind in "fV":
            np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=1e-2, atol=1e-3)
        elif want.dtype.kind == "f":
            np.testing.assert_allclose(got, want, rtol=case.rtol, atol=max(case.atol, 1e-6))
        else:
            np.testing.assert_array_equal(got, want)
