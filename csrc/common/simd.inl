// SPDX-License-Identifier: BSD-3-Clause
// Vectors of float or double and their loads and stores from every storage type, in the compilers' vector extension:
// included once for each instruction set by foreach_cpu_level.h, which sets DYNCONV_VECTOR_BYTES and DYNCONV_LEVEL.

template <class T, class U>
struct PickInt {  // the integer type as wide as a float type, without the standard library
  typedef U type;
};
template <>
struct PickInt<double, int32_t> {
  typedef int64_t type;
};

template <class acc_t>
struct Simd {
  static constexpr int64_t lanes = DYNCONV_VECTOR_BYTES / sizeof(acc_t);
  typedef typename PickInt<acc_t, int32_t>::type int_t;
  typedef acc_t vec __attribute__((vector_size(DYNCONV_VECTOR_BYTES)));
  typedef int_t int_vec __attribute__((vector_size(DYNCONV_VECTOR_BYTES)));
  // The same vector at any address.
  typedef acc_t loose __attribute__((vector_size(DYNCONV_VECTOR_BYTES), aligned(alignof(acc_t)), may_alias));
};
template <class acc_t>
using Vec = typename Simd<acc_t>::vec;

typedef uint32_t u32_vec __attribute__((vector_size(DYNCONV_VECTOR_BYTES)));
typedef uint16_t u16_half_vec __attribute__((vector_size(DYNCONV_VECTOR_BYTES / 2)));
typedef uint16_t u16_half_loose __attribute__((vector_size(DYNCONV_VECTOR_BYTES / 2), aligned(2), may_alias));

DYNCONV_INLINE Vec<float> load(const float* p) { return *reinterpret_cast<const Simd<float>::loose*>(p); }
DYNCONV_INLINE Vec<double> load(const double* p) { return *reinterpret_cast<const Simd<double>::loose*>(p); }
DYNCONV_INLINE Vec<float> load(const bfloat16* p) {
  const u16_half_vec bits = *reinterpret_cast<const u16_half_loose*>(p);
  return __builtin_bit_cast(Vec<float>, __builtin_convertvector(bits, u32_vec) << 16);
}
DYNCONV_INLINE Vec<float> load(const float16* p) {
#if DYNCONV_LEVEL == 2
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif DYNCONV_LEVEL == 1
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int64_t i = 0; i < Simd<float>::lanes; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

DYNCONV_INLINE void store(float* p, Vec<float> v) { *reinterpret_cast<Simd<float>::loose*>(p) = v; }
DYNCONV_INLINE void store(double* p, Vec<double> v) { *reinterpret_cast<Simd<double>::loose*>(p) = v; }
DYNCONV_INLINE void store(bfloat16* p, Vec<float> v) {
#if defined(DYNCONV_AVX512_BF16)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const u32_vec bits = __builtin_bit_cast(u32_vec, v);
  const u32_vec nan = __builtin_bit_cast(u32_vec, v != v);
  const u32_vec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32_vec chosen = (nan & ((bits >> 16) | 0x40u)) | (~nan & rounded);
  *reinterpret_cast<u16_half_loose*>(p) = __builtin_convertvector(chosen, u16_half_vec);
#endif
}
DYNCONV_INLINE void store(float16* p, Vec<float> v) {
#if DYNCONV_LEVEL == 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif DYNCONV_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < Simd<float>::lanes; ++i) from_acc(v[i], p + i);
#endif
}

// The first count elements, zero behind them; count < lanes.
template <class acc_t, class storage_t>
DYNCONV_INLINE Vec<acc_t> load_partial(const storage_t* p, int64_t count) {
  Vec<acc_t> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = to_acc(p[i]);
  return v;
}
template <class acc_t, class storage_t>
DYNCONV_INLINE void store_partial(storage_t* p, Vec<acc_t> v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_acc(v[i], p + i);
}
#if DYNCONV_LEVEL == 2
template <>
DYNCONV_INLINE Vec<float> load_partial<float, float>(const float* p, int64_t count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1u), p);
}
template <>
DYNCONV_INLINE void store_partial<float, float>(float* p, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1u), (__m512)v);
}
template <>
DYNCONV_INLINE Vec<float> load_partial<float, bfloat16>(const bfloat16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1u), p);
  return (Vec<float>)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
template <>
DYNCONV_INLINE void store_partial<float, bfloat16>(bfloat16* p, Vec<float> v, int64_t count) {
  bfloat16 whole[Simd<float>::lanes];
  store(whole, v);
  _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1u),
                           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(whole)));
}
template <>
DYNCONV_INLINE Vec<float> load_partial<float, float16>(const float16* p, int64_t count) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1u), p));
}
template <>
DYNCONV_INLINE void store_partial<float, float16>(float16* p, Vec<float> v, int64_t count) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1u),
                           _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// Largest whole number not above, for |v| < 2^31.
template <class acc_t>
DYNCONV_INLINE Vec<acc_t> floor_lanes(Vec<acc_t> v) {
  const Vec<acc_t> whole = __builtin_convertvector(__builtin_convertvector(v, typename Simd<acc_t>::int_vec), Vec<acc_t>);
  return whole > v ? whole - 1 : whole;
}
DYNCONV_INLINE Vec<float> floor_of(Vec<float> v) { return floor_lanes<float>(v); }
DYNCONV_INLINE Vec<double> floor_of(Vec<double> v) { return floor_lanes<double>(v); }

template <class acc_t>
DYNCONV_INLINE acc_t sum_lanes(Vec<acc_t> v) {
  acc_t total = v[0];
  for (int64_t i = 1; i < Simd<acc_t>::lanes; ++i) total += v[i];
  return total;
}
#if DYNCONV_LEVEL == 2
template <>
DYNCONV_INLINE float sum_lanes<float>(Vec<float> v) {
  return _mm512_reduce_add_ps((__m512)v);
}
#endif

// Turns lanes vectors over: lane j of vector i becomes lane i of vector j.
template <class acc_t>
DYNCONV_INLINE void transpose_block(Vec<acc_t>* rows) {
  constexpr int lanes = int(Simd<acc_t>::lanes);
#pragma GCC unroll 4
  for (int s = 1; s < lanes; s *= 2) {
    typename Simd<acc_t>::int_vec low, high;
    for (int j = 0; j < lanes; ++j) {
      low[j] = j & s ? j - s + lanes : j;
      high[j] = j & s ? j + lanes : j + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & s) continue;
      const Vec<acc_t> a = rows[i], b = rows[i + s];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}

// to[j * to_stride + i] = from[i * from_stride + j], converting, for i < rows and j < columns, each at most lanes.
template <class acc_t, class from_t, class to_t>
DYNCONV_INLINE void transpose_piece(const from_t* from, int64_t from_stride, to_t* to, int64_t to_stride, int64_t rows,
                                    int64_t columns) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  if (rows == lanes && columns == lanes) {
    Vec<acc_t> block[lanes];
#pragma GCC unroll 16
    for (int64_t l = 0; l < lanes; ++l) block[l] = load(from + l * from_stride);
    transpose_block<acc_t>(block);
#pragma GCC unroll 16
    for (int64_t l = 0; l < lanes; ++l) store(to + l * to_stride, block[l]);
    return;
  }
  Vec<acc_t> block[lanes] = {};
  for (int64_t l = 0; l < rows; ++l)
    block[l] = columns == lanes ? load(from + l * from_stride) : load_partial<acc_t>(from + l * from_stride, columns);
  transpose_block<acc_t>(block);
  for (int64_t l = 0; l < columns; ++l) {
    if (rows == lanes) store(to + l * to_stride, block[l]);
    else store_partial<acc_t>(to + l * to_stride, block[l], rows);
  }
}

// The same for any rows and columns, converting through acc_t. DOWN goes down the rows first: the order in which a
// channels-first image, on either side, is passed in streams.
template <bool DOWN, class acc_t, class from_t, class to_t>
void transpose(const from_t* from, int64_t from_stride, to_t* to, int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  for (int64_t outer = 0; outer < (DOWN ? columns : rows); outer += lanes)
    for (int64_t inner = 0; inner < (DOWN ? rows : columns); inner += lanes) {
      const int64_t i = DOWN ? inner : outer, j = DOWN ? outer : inner;
      transpose_piece<acc_t>(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride,
                             rows - i < lanes ? rows - i : lanes, columns - j < lanes ? columns - j : lanes);
    }
}
