// SPDX-License-Identifier: BSD-3-Clause
// The tables of dynamic_conv2d's loops for an instruction set: included by foreach_cpu_level.h inside a namespace, after
// simd.inl.

#include "common/matmul.inl"
#include "common/rows.inl"
#include "dynamic_conv2d/dynamic_conv2d_cpu_columns.inl"
#include "dynamic_conv2d/dynamic_conv2d_cpu_depthwise.inl"
#include "dynamic_conv2d/dynamic_conv2d_cpu_mixing.inl"
#if defined(DYNCONV_AVX512_BF16)
#include "common/pairs.inl"
#include "dynamic_conv2d/dynamic_conv2d_cpu_pairs.inl"
#endif

template <class storage_t, class acc_t, class product_t>
DynamicKernels<storage_t, acc_t, product_t> dynamic_kernels() {
  DynamicKernels<storage_t, acc_t, product_t> k;
  k.lanes = Simd<acc_t>::lanes;
  k.mix = &mix<storage_t, acc_t, product_t>;
  k.unmix = &unmix<storage_t, acc_t, product_t>;
  k.add_lanes = &add_lanes<acc_t>;
  k.to_product = &convert_row<acc_t, storage_t, product_t>;
  k.from_product = &convert_row<acc_t, product_t, storage_t>;
  k.from_acc = &convert_row<acc_t, acc_t, storage_t>;
  k.add_row = &add_row<storage_t, acc_t>;
  k.sum_row = &sum_row<storage_t, acc_t>;
  return k;
}

template <class storage_t, class acc_t, class tile_t>
DynamicTileKernels<storage_t, acc_t, tile_t> dynamic_tile_kernels() {
  DynamicTileKernels<storage_t, acc_t, tile_t> k{};
  k.lanes = Simd<acc_t>::lanes;
  k.mix = &mix<storage_t, acc_t, tile_t>;
  k.unmix = &unmix<storage_t, acc_t, acc_t>;
  k.add_lanes = &add_lanes<acc_t>;
  k.pack_rows = &pack_rows<storage_t, acc_t>;
  k.unpack_rows = &unpack_rows<storage_t, acc_t>;
  k.add_columns = &add_columns<acc_t>;
  k.make_panels = &make_panels<acc_t, storage_t, tile_t>;
  k.write_rows = &write_rows<acc_t, storage_t>;
  k.from_acc = &convert_row<acc_t, acc_t, storage_t>;
  if constexpr (std::is_same_v<tile_t, acc_t>) {
    k.matmul = &matmul<acc_t>;
    k.make_columns = &make_columns<acc_t>;
    k.make_transposed_columns = &make_transposed_columns<acc_t>;
  } else {
#if defined(DYNCONV_AVX512_BF16)
    k.matmul = &matmul_pairs;
    k.make_columns = &make_pair_columns;
    k.make_transposed_columns = &make_transposed_pair_columns;
    k.make_pair_panels = &make_pair_panels;
    k.turn_over = &turn_over;
#endif
  }
  return k;
}
