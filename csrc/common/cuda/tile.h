// SPDX-License-Identifier: BSD-3-Clause
// Tiles of operands in shared memory, and products of them by a warp: on tensor cores, or with plain fused multiply-add.
//
// A tile has rows of 128 bytes, so that one type's tile has the shape of another's; its 16-byte chunks are permuted
// within a row (chunk ^ row % 8), which keeps a column of chunks, as well as a row of them, free of bank conflicts.
#pragma once

#include <ptx.h>

#include "common/half_types.h"

#include <cstdint>
#include <type_traits>

namespace dynconv {

// A float rounded to TF32, as an operand of the tensor cores.
struct tfloat32 {
  uint32_t bits;
};

// A float as it is in memory, rounded to TF32 when it is multiplied: for operands that are copied, not computed.
struct unrounded_tfloat32 {
  float value;
};

constexpr int kRowBytes = 128;
constexpr int kRowChunks = 8;
// A product goes through a row of operands in this many slices of 32 bytes.
constexpr int kSlices = 4;
template <class T>
constexpr int kRow = kRowBytes / int(sizeof(T));  // numbers in a row
template <class T>
constexpr int kChunk = 16 / int(sizeof(T));  // numbers in a chunk

DYNCONV_DEVICE int chunk_offset(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) << 4); }

template <class T>
DYNCONV_DEVICE const T* tile_chunk(const unsigned char* tile, int row, int chunk) {
  return reinterpret_cast<const T*>(tile + chunk_offset(row, chunk));
}
template <class T>
DYNCONV_DEVICE T tile_value(const unsigned char* tile, int row, int column) {
  return tile_chunk<T>(tile, row, column / kChunk<T>)[column % kChunk<T>];
}

// Writes kChunk numbers, rounded to T.
DYNCONV_DEVICE void write_chunk(const float (&v)[8], bfloat16 tag, void* to) {
  *static_cast<uint4*>(to) = make_uint4(pack_halves(tag, v[0], v[1]), pack_halves(tag, v[2], v[3]),
                                        pack_halves(tag, v[4], v[5]), pack_halves(tag, v[6], v[7]));
}
DYNCONV_DEVICE void write_chunk(const float (&v)[8], float16 tag, void* to) {
  *static_cast<uint4*>(to) = make_uint4(pack_halves(tag, v[0], v[1]), pack_halves(tag, v[2], v[3]),
                                        pack_halves(tag, v[4], v[5]), pack_halves(tag, v[6], v[7]));
}
DYNCONV_DEVICE void write_chunk(const float (&v)[4], tfloat32, void* to) {
  *static_cast<uint4*>(to) = make_uint4(to_tf32(v[0]), to_tf32(v[1]), to_tf32(v[2]), to_tf32(v[3]));
}
DYNCONV_DEVICE void write_chunk(const float (&v)[4], float, void* to) {
  *static_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}
DYNCONV_DEVICE void write_chunk(const double (&v)[2], double, void* to) {
  *static_cast<double2*>(to) = make_double2(v[0], v[1]);
}

// The same for half a chunk: 8 bytes.
DYNCONV_DEVICE void write_half_chunk(const float (&v)[4], bfloat16 tag, void* to) {
  *static_cast<uint2*>(to) = make_uint2(pack_halves(tag, v[0], v[1]), pack_halves(tag, v[2], v[3]));
}
DYNCONV_DEVICE void write_half_chunk(const float (&v)[4], float16 tag, void* to) {
  *static_cast<uint2*>(to) = make_uint2(pack_halves(tag, v[0], v[1]), pack_halves(tag, v[2], v[3]));
}
DYNCONV_DEVICE void write_half_chunk(const float (&v)[2], float, void* to) {
  *static_cast<float2*>(to) = make_float2(v[0], v[1]);
}
DYNCONV_DEVICE void write_half_chunk(const double (&v)[1], double, void* to) { *static_cast<double*>(to) = v[0]; }

// ---------------------------------------------------------------------------------------------------------- products

// Product<T, transposed>: a warp's share, an M x N matrix of sums, of a product of two tiles.
//   not transposed: rows of the tiles are rows m of A and columns n of B, each holding kRow numbers of the depth;
//                   acc(m, n) += sum_k a[m][k] b[n][k]
//   transposed:     rows of the tiles are steps k of the depth; acc(m, n) += sum_k a[k][m] b[k][n]. Where M or N is more
//                   than a row holds, tiles of column_stride bytes follow each other.
// add() does one slice: 32 bytes of each row; transposed, kDepth rows.

// 16-bit numbers and TF32, through mma.sync. M and N are multiples of 16.
template <class T, bool transposed>
struct TensorCoreProduct {
  using acc_t = float;
  static constexpr int kDepth = 32 / int(sizeof(T));  // of a slice, and of an mma
  static constexpr bool kHalf = sizeof(T) == 2, kRounds = std::is_same_v<T, unrounded_tfloat32>;

  template <int M, int N>
  struct Sums {
    static constexpr int kCount = M / 16 * (N / 8) * 4;
    float v[M / 16][N / 8][4] = {};
    DYNCONV_DEVICE float& operator[](int i) { return v[i / 4 / (N / 8)][i / 4 % (N / 8)][i % 4]; }
  };

  template <int M, int N>
  static DYNCONV_DEVICE void add(Sums<M, N>& sums, const unsigned char* a, int a_first, int a_column_stride,
                                 const unsigned char* b, int b_first, int b_column_stride, int slice) {
    uint32_t fb[N / 8][2];
    DYNCONV_UNROLL
    for (int j = 0; j < N / 16; ++j) {
      uint32_t r[4];
      load_b(r, b, b_first + 16 * j, b_column_stride, slice);
      fb[2 * j][0] = r[0], fb[2 * j][1] = r[1], fb[2 * j + 1][0] = r[2], fb[2 * j + 1][1] = r[3];
    }
    DYNCONV_UNROLL
    for (int i = 0; i < M / 16; ++i) {
      uint32_t fa[4];
      load_a(fa, a, a_first + 16 * i, a_column_stride, slice);
      DYNCONV_UNROLL
      for (int j = 0; j < N / 8; ++j) {
        if constexpr (kHalf) mma_m16n8k16(T(), sums.v[i][j], fa, fb[j]);
        else mma_m16n8k8_tf32(sums.v[i][j], fa, fb[j]);
      }
    }
  }

  // f(m, n, sum) for each of the lane's sums; f may change it.
  template <int M, int N, class F>
  static DYNCONV_DEVICE void for_each(Sums<M, N>& sums, F f) {
    const int g = int(threadIdx.x & 31) / 4, t = int(threadIdx.x & 31) % 4;
    DYNCONV_UNROLL
    for (int i = 0; i < M / 16; ++i)
      DYNCONV_UNROLL
      for (int j = 0; j < N / 8; ++j)
        DYNCONV_UNROLL
        for (int e = 0; e < 4; ++e) f(16 * i + g + 8 * (e / 2), 8 * j + 2 * t + e % 2, sums.v[i][j][e]);
  }

 private:
  static DYNCONV_DEVICE void load_a(uint32_t (&r)[4], const unsigned char* a, int first, int column_stride, int slice) {
    const int lane = int(threadIdx.x & 31);
    if constexpr (!transposed) {
      ldmatrix_x4(r, a + chunk_offset(first + lane % 16, 2 * slice + lane / 16));
      round(r);
    } else if constexpr (kHalf) {
      const int column = first + (lane / 8 % 2) * 8;
      ldmatrix_x4_trans(r, column_tile(a, column, column_stride) +
                               chunk_offset(slice * kDepth + lane % 8 + lane / 16 * 8, column % kRow<T> / 8));
    } else {
      // ldmatrix transposes 16-bit numbers only.
      const int g = lane / 4, t = lane % 4;
      DYNCONV_UNROLL
      for (int i = 0; i < 4; ++i)
        r[i] = value(a, slice * kDepth + t + i / 2 * 4, first + g + i % 2 * 8, column_stride);
      round(r);
    }
  }
  static DYNCONV_DEVICE void load_b(uint32_t (&r)[4], const unsigned char* b, int first, int column_stride, int slice) {
    const int lane = int(threadIdx.x & 31);
    if constexpr (!transposed) {
      ldmatrix_x4(r, b + chunk_offset(first + lane % 8 + lane / 16 * 8, 2 * slice + lane / 8 % 2));
      round(r);
    } else if constexpr (kHalf) {
      const int column = first + lane / 16 * 8;
      ldmatrix_x4_trans(r, column_tile(b, column, column_stride) +
                               chunk_offset(slice * kDepth + lane % 8 + lane / 8 % 2 * 8, column % kRow<T> / 8));
    } else {
      const int g = lane / 4, t = lane % 4;
      DYNCONV_UNROLL
      for (int i = 0; i < 4; ++i)
        r[i] = value(b, slice * kDepth + t + i % 2 * 4, first + g + i / 2 * 8, column_stride);
      round(r);
    }
  }
  static DYNCONV_DEVICE void round(uint32_t (&r)[4]) {
    if constexpr (kRounds) {
      DYNCONV_UNROLL
      for (int i = 0; i < 4; ++i) r[i] = to_tf32(__uint_as_float(r[i]));
    }
  }
  static DYNCONV_DEVICE const unsigned char* column_tile(const unsigned char* tile, int column, int column_stride) {
    return tile + column / kRow<T> * column_stride;
  }
  static DYNCONV_DEVICE uint32_t value(const unsigned char* tile, int row, int column, int column_stride) {
    return tile_value<uint32_t>(column_tile(tile, column, column_stride), row, column % kRow<T>);
  }
};

// float and double, exactly. Lanes stand 4 x 8: M is a multiple of 4, N of 8; transposed, of 4 and 8 chunks.
template <class T, bool transposed>
struct PlainProduct {
  using acc_t = T;
  static constexpr int kDepth = 32 / int(sizeof(T));
  static constexpr int kStep = transposed ? kChunk<T> : 1;  // neighbouring sums of a lane

  template <int M, int N>
  struct Sums {
    static constexpr int kCount = M / 4 * (N / 8);
    T v[M / 4][N / 8] = {};
    DYNCONV_DEVICE T& operator[](int i) { return v[i / (N / 8)][i % (N / 8)]; }
  };

  template <int M, int N>
  static DYNCONV_DEVICE void add(Sums<M, N>& sums, const unsigned char* a, int a_first, int a_column_stride,
                                 const unsigned char* b, int b_first, int b_column_stride, int slice) {
    constexpr int V = kChunk<T>;
    const int lane_m = int(threadIdx.x & 31) / 8, lane_n = int(threadIdx.x & 31) % 8;
    if constexpr (!transposed) {
      DYNCONV_UNROLL
      for (int chunk = 2 * slice; chunk < 2 * slice + 2; ++chunk) {
        T vb[N / 8][V];
        DYNCONV_UNROLL
        for (int j = 0; j < N / 8; ++j) read(vb[j], b, b_first + lane_n + 8 * j, chunk);
        DYNCONV_UNROLL
        for (int i = 0; i < M / 4; ++i) {
          T va[V];
          read(va, a, a_first + lane_m + 4 * i, chunk);
          DYNCONV_UNROLL
          for (int j = 0; j < N / 8; ++j)
            DYNCONV_UNROLL
            for (int e = 0; e < V; ++e) sums.v[i][j] += va[e] * vb[j][e];
        }
      }
    } else {
      DYNCONV_UNROLL
      for (int k = slice * kDepth; k < (slice + 1) * kDepth; ++k) {
        T va[M / 4], vb[N / 8];
        read_columns<4>(va, a, k, a_first + lane_m * V, a_column_stride);
        read_columns<8>(vb, b, k, b_first + lane_n * V, b_column_stride);
        DYNCONV_UNROLL
        for (int i = 0; i < M / 4; ++i)
          DYNCONV_UNROLL
          for (int j = 0; j < N / 8; ++j) sums.v[i][j] += va[i] * vb[j];
      }
    }
  }

  template <int M, int N, class F>
  static DYNCONV_DEVICE void for_each(Sums<M, N>& sums, F f) {
    const int lane_m = int(threadIdx.x & 31) / 8, lane_n = int(threadIdx.x & 31) % 8;
    DYNCONV_UNROLL
    for (int i = 0; i < M / 4; ++i)
      DYNCONV_UNROLL
      for (int j = 0; j < N / 8; ++j)
        f((i / kStep * 4 + lane_m) * kStep + i % kStep, (j / kStep * 8 + lane_n) * kStep + j % kStep, sums.v[i][j]);
  }

 private:
  template <int V>
  static DYNCONV_DEVICE void read(T (&to)[V], const unsigned char* tile, int row, int chunk) {
    const uint4 bits = *reinterpret_cast<const uint4*>(tile + chunk_offset(row, chunk));
    __builtin_memcpy(to, &bits, 16);
  }
  // Chunks of one row, `lanes` chunks apart.
  template <int lanes, int count>
  static DYNCONV_DEVICE void read_columns(T (&to)[count], const unsigned char* tile, int row, int first,
                                          int column_stride) {
    constexpr int V = kChunk<T>;
    static_assert(count % V == 0);
    DYNCONV_UNROLL
    for (int i = 0; i < count / V; ++i) {
      const int column = first + i * lanes * V;
      T part[V];
      read(part, tile + column / kRow<T> * column_stride, row, column % kRow<T> / V);
      DYNCONV_UNROLL
      for (int e = 0; e < V; ++e) to[i * V + e] = part[e];
    }
  }
};

template <class T, bool transposed>
struct ProductOf {
  using type = TensorCoreProduct<T, transposed>;
};
template <bool transposed>
struct ProductOf<float, transposed> {
  using type = PlainProduct<float, transposed>;
};
template <bool transposed>
struct ProductOf<double, transposed> {
  using type = PlainProduct<double, transposed>;
};
template <class T, bool transposed>
using Product = typename ProductOf<T, transposed>::type;

// ----------------------------------------------------------------------------------------- numbers in global memory

// The numbers of a chunk, as they are accumulated in.
DYNCONV_DEVICE void unpack(uint4 bits, bfloat16 tag, float (&v)[8]) {
  unpack_halves(tag, bits.x, &v[0], &v[1]), unpack_halves(tag, bits.y, &v[2], &v[3]);
  unpack_halves(tag, bits.z, &v[4], &v[5]), unpack_halves(tag, bits.w, &v[6], &v[7]);
}
DYNCONV_DEVICE void unpack(uint4 bits, float16 tag, float (&v)[8]) {
  unpack_halves(tag, bits.x, &v[0], &v[1]), unpack_halves(tag, bits.y, &v[2], &v[3]);
  unpack_halves(tag, bits.z, &v[4], &v[5]), unpack_halves(tag, bits.w, &v[6], &v[7]);
}
DYNCONV_DEVICE void unpack(uint4 bits, float, float (&v)[4]) { __builtin_memcpy(v, &bits, 16); }
DYNCONV_DEVICE void unpack(uint4 bits, double, double (&v)[2]) { __builtin_memcpy(v, &bits, 16); }

// The first (0) or second (1) half of a chunk.
template <class T>
DYNCONV_DEVICE void unpack_half(uint4 bits, int half, T tag, float (&v)[4]) {
  const uint32_t low = half ? bits.z : bits.x, high = half ? bits.w : bits.y;
  unpack_halves(tag, low, &v[0], &v[1]), unpack_halves(tag, high, &v[2], &v[3]);
}
DYNCONV_DEVICE void unpack_half(uint4 bits, int half, float, float (&v)[2]) {
  v[0] = __uint_as_float(half ? bits.z : bits.x), v[1] = __uint_as_float(half ? bits.w : bits.y);
}
DYNCONV_DEVICE void unpack_half(uint4 bits, int half, double, double (&v)[1]) {
  double all[2];
  unpack(bits, double(), all);
  v[0] = half ? all[1] : all[0];
}

}  // namespace dynconv
