// SPDX-License-Identifier: BSD-3-Clause
// Loops over runs of elements: included after simd.inl.

// to[i] = from[i], converting through acc_t.
template <class acc_t, class from_t, class to_t>
void convert_row(const from_t* from, to_t* to, int64_t count) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  if (i < count) store_partial<acc_t>(to + i, load_partial<acc_t>(from + i, count - i), count - i);
}

// to[i] += from[i]
template <class from_t, class acc_t>
void add_row(const from_t* from, acc_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += to_acc(from[i]);
}

template <class from_t, class acc_t>
acc_t sum_row(const from_t* from, int64_t count) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  Vec<acc_t> sum = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) sum += load(from + i);
  if (i < count) sum += load_partial<acc_t>(from + i, count - i);
  return sum_lanes<acc_t>(sum);
}
