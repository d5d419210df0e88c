// SPDX-License-Identifier: BSD-3-Clause
// Mixing weights, aggregate_kernels and its backward, and the last steps of both backwards. Every sum has a fixed order.
//
// A kernel of the bank, or of a sample, is here a row of O * row numbers. Threads own neighbouring numbers of it: in the
// forward for some samples at a time, whose sums stay in registers while the bank goes by; in the backward for all
// samples, whose gradients go by while some kernels of the bank and their gradients stay in registers.
#include "common/cuda/launch.h"
#include "common/cuda/operands.h"
#include "dynamic_conv2d/dynamic_conv2d_cuda.h"
#include "dynamic_conv2d/dynamic_conv2d_math.h"

#include <initializer_list>
#include <type_traits>

namespace dynconv {
namespace dynamic_cuda {
namespace {

constexpr int kThreads = 128;

template <class storage_t>
using acc_of = std::conditional_t<std::is_same_v<storage_t, double>, double, float>;

// Calls f with a number of the type in which a precision's tensors are stored.
template <class F>
auto dispatch_storage(Precision precision, F f) {
  switch (precision) {
    case Precision::float64: return f(double());
    case Precision::bfloat16: return f(bfloat16());
    case Precision::float16: return f(float16());
    default: return f(float());
  }
}

// ------------------------------------------------------------------------------------------- a thread's own numbers

// Which numbers of a row of `size` a thread owns, `count` of them in each tile of kThreads * count. vectors: neighbours,
// read and written 16 or 8 bytes at once (rows must allow it); else one at a time, kThreads apart.
template <class storage_t, int count, bool vectors>
class OwnNumbers {
 public:
  using acc_t = acc_of<storage_t>;
  static constexpr int kTile = kThreads * count;

  DYNCONV_DEVICE OwnNumbers(int64_t tile, int64_t size)
      : first_(tile * kTile + int64_t(threadIdx.x) * (vectors ? count : 1)), size_(size) {}

  // 0 beyond the row.
  DYNCONV_DEVICE void read(const storage_t* row, acc_t (&v)[count]) const {
    if constexpr (vectors) {
      const Bits bits = first_ < size_ ? __ldg(reinterpret_cast<const Bits*>(row + first_)) : Bits{};
      if constexpr (kBytes == 16) {
        unpack(bits, storage_t(), v);
      } else {
        unpack_halves(storage_t(), bits.x, &v[0], &v[1]);
        unpack_halves(storage_t(), bits.y, &v[2], &v[3]);
      }
    } else {
      DYNCONV_UNROLL
      for (int e = 0; e < count; ++e) {
        const int64_t i = first_ + e * kThreads;
        v[e] = i < size_ ? to_acc(row[i]) : acc_t(0);
      }
    }
  }
  DYNCONV_DEVICE void write(const acc_t (&v)[count], storage_t* row) const {
    if constexpr (vectors) {
      if (first_ >= size_) return;
      if constexpr (kBytes == 16) {
        write_chunk(v, storage_t(), row + first_);
      } else {
        *reinterpret_cast<uint2*>(row + first_) =
            make_uint2(pack_halves(storage_t(), v[0], v[1]), pack_halves(storage_t(), v[2], v[3]));
      }
    } else {
      DYNCONV_UNROLL
      for (int e = 0; e < count; ++e) {
        const int64_t i = first_ + e * kThreads;
        if (i < size_) from_acc(v[e], row + i);
      }
    }
  }

 private:
  static constexpr int kBytes = count * int(sizeof(storage_t));
  static_assert(kBytes == 16 || (kBytes == 8 && count == 4));
  using Bits = std::conditional_t<kBytes == 16, uint4, uint2>;
  int64_t first_, size_;
};

// Calls f with a type that says whether rows of `size` numbers can be read as vectors of `count`. Null pointers can.
template <class storage_t, int count, class F>
cudaError_t dispatch_vectors(int64_t size, std::initializer_list<const void*> pointers, F f) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  const bool vectors = size % count == 0 && bits % (uintptr_t(count) * sizeof(storage_t)) == 0;
  return vectors ? f(std::true_type()) : f(std::false_type());
}

// ---------------------------------------------------------------------------------------------------- mixing weights

// A block's threads copy the attention of kThreads samples, then each turns one sample's into mixing weights. One block
// a multiprocessor: asked for nothing, ptxas spills registers around the exponential of a double.
template <class acc_t>
__global__ void __launch_bounds__(kThreads, 1)
    mixing_weights_kernel(const KernelBankParams p, const ScalarReader<acc_t> attention, acc_t* mix) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, rest = p.batch - first;
  const int64_t begin = first * p.num_kernels, end = begin + (rest < kThreads ? rest : kThreads) * p.num_kernels;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) mix[i] = attention[i];
  __syncthreads();
  if (threadIdx.x < rest) mixing_weights(p, mix + begin + threadIdx.x * p.num_kernels);
}

// -------------------------------------------------------------------------------------------------- aggregate_kernels

template <class storage_t>
struct AggregateArguments {
  int64_t batch, num_kernels, out_channels, size;  // size: of a kernel
  const storage_t *weight, *bias;
  const acc_of<storage_t>* mix;
  storage_t *kernels, *biases;
  int64_t tiles;             // of a kernel
  int64_t samples_of_share;  // a block does a tile of this many samples
  int64_t weight_blocks;     // the blocks after them mix biases
};

template <class storage_t, bool vectors, int samples>
__global__ void __launch_bounds__(kThreads) aggregate_kernel(const AggregateArguments<storage_t> a) {
  using acc_t = acc_of<storage_t>;
  constexpr int count = kChunk<storage_t>;
  if (blockIdx.x >= a.weight_blocks) {
    const int64_t i = (blockIdx.x - a.weight_blocks) * kThreads + threadIdx.x;
    if (i >= a.batch * a.out_channels) return;
    const int64_t n = i / a.out_channels, o = i - n * a.out_channels;
    acc_t sum = 0;
    for (int64_t k = 0; k < a.num_kernels; ++k)
      sum += a.mix[n * a.num_kernels + k] * to_acc(a.bias[k * a.out_channels + o]);
    from_acc(sum, a.biases + i);
    return;
  }
  const int64_t tile = blockIdx.x % a.tiles, share = blockIdx.x / a.tiles;
  const OwnNumbers<storage_t, count, vectors> own(tile, a.size);
  const int64_t begin = share * a.samples_of_share;
  const int64_t end = begin + a.samples_of_share < a.batch ? begin + a.samples_of_share : a.batch;
  for (int64_t first = begin; first < end; first += samples) {
    acc_t sums[samples][count] = {};
    // After the first samples the bank comes from the first-level cache.
    for (int64_t k = 0; k < a.num_kernels; ++k) {
      acc_t kernel[count];
      own.read(a.weight + k * a.size, kernel);
      DYNCONV_UNROLL
      for (int s = 0; s < samples; ++s) {
        // The last sample again where there is none: its sum is not written.
        const int64_t n = first + s < end ? first + s : end - 1;
        const acc_t share_of_kernel = __ldg(a.mix + n * a.num_kernels + k);
        DYNCONV_UNROLL
        for (int e = 0; e < count; ++e) sums[s][e] += share_of_kernel * kernel[e];
      }
    }
    DYNCONV_UNROLL
    for (int s = 0; s < samples; ++s)
      if (first + s < end) own.write(sums[s], a.kernels + (first + s) * a.size);
  }
}

template <class storage_t, bool vectors, int samples>
cudaError_t launch_aggregate(AggregateArguments<storage_t> a, cudaStream_t stream) {
  a.tiles = ceil_div(a.size, kThreads * kChunk<storage_t>);
  // As many shares of the samples as give every multiprocessor some blocks.
  const int64_t groups = ceil_div(a.batch, samples);
  const int64_t wanted = ceil_div(int64_t(multiprocessors()) * 8, a.tiles);
  const int64_t groups_of_share = ceil_div(groups, wanted < groups ? wanted : groups);
  a.samples_of_share = groups_of_share * samples;
  a.weight_blocks = a.tiles * ceil_div(groups, groups_of_share);
  const int64_t bias_blocks = a.bias == nullptr ? 0 : ceil_div(a.batch * a.out_channels, kThreads);
  return launch(aggregate_kernel<storage_t, vectors, samples>, a.weight_blocks + bias_blocks, kThreads, 0, stream, a);
}

// ----------------------------------------------------------------------------------------- aggregate_kernels' backward

template <class storage_t>
struct AggregateBackwardArguments {
  int64_t batch, num_kernels, size;
  const storage_t *grad_kernels, *weight;
  const acc_of<storage_t>* mix;
  storage_t* grad_weight;   // null: not wanted
  acc_of<storage_t>* dots;  // (blocks, N, K), of the block's part of the kernels; null: not wanted
};

// The warp's sums of 32 values: lane i gets that of the values i. Lanes that agree in their higher bits share a part of
// the values; a step gives half of it to one half of the lanes.
template <int half = 16, class acc_t, int count>
DYNCONV_DEVICE acc_t sum_each(acc_t (&values)[count]) {
  static_assert(count == 2 * half);
  const bool upper = (threadIdx.x & half) != 0;
  acc_t kept[half];
  DYNCONV_UNROLL
  for (int i = 0; i < half; ++i)
    kept[i] = (upper ? values[i + half] : values[i]) +
              __shfl_xor_sync(0xffffffffu, upper ? values[i] : values[i + half], half);
  if constexpr (half == 1) return kept[0];
  else return sum_each<half / 2>(kept);
}

// Numbers of a kernel that a thread owns: 16 bytes of them, or half of that where registers have not room for more.
template <class storage_t, int held>
constexpr int kOwn = kChunk<storage_t> == 8 && held == 16 ? 4 : kChunk<storage_t>;

// held: kernels of the bank whose numbers and gradients a thread holds; with more, the samples go by once more.
template <class storage_t, int held, bool vectors>
__global__ void __launch_bounds__(kThreads) aggregate_backward_kernel(const AggregateBackwardArguments<storage_t> a) {
  using acc_t = acc_of<storage_t>;
  constexpr int count = kOwn<storage_t, held>, kWarps = kThreads / 32;
  constexpr int kSamples = 32 / held;  // whose dots a warp adds up together
  auto* const sums_of_warps = reinterpret_cast<acc_t*>(dynamic_shared());  // (2, warps, 32)
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const OwnNumbers<storage_t, count, vectors> own(blockIdx.x, a.size);
  const bool wants_weight = a.grad_weight != nullptr, wants_dots = a.dots != nullptr;
  int fill = 0;
  for (int64_t first_kernel = 0; first_kernel < a.num_kernels; first_kernel += held) {
    acc_t kernels[held][count] = {}, gradients[held][count] = {};
    if (wants_dots) {
      DYNCONV_UNROLL
      for (int k = 0; k < held; ++k)
        if (first_kernel + k < a.num_kernels) own.read(a.weight + (first_kernel + k) * a.size, kernels[k]);
    }
    for (int64_t first = 0; first < a.batch; first += kSamples) {
      acc_t dots[32];
      DYNCONV_UNROLL
      for (int s = 0; s < kSamples; ++s) {
        const int64_t n = first + s;
        acc_t gradient[count] = {};
        if (n < a.batch) own.read(a.grad_kernels + n * a.size, gradient);
        if (wants_weight) {
          DYNCONV_UNROLL
          for (int k = 0; k < held; ++k) {
            const bool exists = n < a.batch && first_kernel + k < a.num_kernels;
            const acc_t share = exists ? __ldg(a.mix + n * a.num_kernels + first_kernel + k) : acc_t(0);
            DYNCONV_UNROLL
            for (int e = 0; e < count; ++e) gradients[k][e] += share * gradient[e];
          }
        }
        if (wants_dots) {
          DYNCONV_UNROLL
          for (int k = 0; k < held; ++k) {
            acc_t dot = 0;
            DYNCONV_UNROLL
            for (int e = 0; e < count; ++e) dot += kernels[k][e] * gradient[e];
            dots[s * held + k] = dot;
          }
        }
      }
      if (!wants_dots) continue;
      acc_t* const sums = sums_of_warps + fill * kWarps * 32;
      sums[warp * 32 + lane] = sum_each(dots);
      // Two buffers: warp 0 may still read the one before.
      __syncthreads();
      fill ^= 1;
      const int64_t n = first + lane / held, k = first_kernel + lane % held;
      if (warp == 0 && n < a.batch && k < a.num_kernels) {
        acc_t sum = 0;
        DYNCONV_UNROLL
        for (int w = 0; w < kWarps; ++w) sum += sums[w * 32 + lane];
        a.dots[(blockIdx.x * a.batch + n) * a.num_kernels + k] = sum;
      }
    }
    if (wants_weight) {
      DYNCONV_UNROLL
      for (int k = 0; k < held; ++k)
        if (first_kernel + k < a.num_kernels) own.write(gradients[k], a.grad_weight + (first_kernel + k) * a.size);
    }
  }
}

// Kernels that a thread holds at once.
inline int held_kernels(const KernelBankParams& p) { return p.num_kernels <= 4 ? 4 : p.num_kernels <= 8 ? 8 : 16; }

template <class storage_t>
int64_t backward_blocks(const KernelBankParams& p) {
  const int own = held_kernels(p) == 16 ? kOwn<storage_t, 16> : kOwn<storage_t, 4>;
  return ceil_div(p.kernel_size(), kThreads * own);
}

template <class storage_t, int held>
cudaError_t launch_aggregate_backward(const AggregateBackwardArguments<storage_t>& a, cudaStream_t stream) {
  constexpr int own = kOwn<storage_t, held>;
  return dispatch_vectors<storage_t, own>(a.size, {a.grad_kernels, a.weight, a.grad_weight}, [&](auto vectors) {
    return launch(aggregate_backward_kernel<storage_t, held, decltype(vectors)::value>,
                  ceil_div(a.size, kThreads * own), kThreads, 2 * kThreads * sizeof(acc_of<storage_t>), stream, a);
  });
}

// ------------------------------------------------------------------------------------------------- the last steps

// sums_t: what the gradient of the mixed biases is stored in.
template <class storage_t, class sums_t>
struct FinishArguments {
  using acc_t = acc_of<storage_t>;
  KernelBankParams bank;
  acc_t* dots;  // (parts, N, K); part 0 becomes the sum
  int64_t parts;
  const storage_t* bias;
  const sums_t* pixel_sums;  // (N, O); null: no bias
  const acc_t* mix;
  storage_t* grad_bias;                 // null: not wanted
  ScalarWriter<acc_t> grad_attention;   // data is null: not wanted
  int64_t attention_blocks;             // the blocks after them add up grad_bias
};

constexpr int kFinishThreads = 256;

// A block finishes a sample's attention, or a thread a number of grad_bias.
template <class storage_t, class sums_t>
__global__ void __launch_bounds__(kFinishThreads) finish_attention_kernel(const FinishArguments<storage_t, sums_t> a) {
  using acc_t = acc_of<storage_t>;
  const int64_t num_kernels = a.bank.num_kernels, out_channels = a.bank.out_channels;
  if (blockIdx.x >= a.attention_blocks) {
    const int64_t i = (blockIdx.x - a.attention_blocks) * kFinishThreads + threadIdx.x;
    if (i >= num_kernels * out_channels) return;
    const int64_t k = i / out_channels, o = i - k * out_channels;
    acc_t sum = 0;
    for (int64_t n = 0; n < a.bank.batch; ++n)
      sum += a.mix[n * num_kernels + k] * to_acc(a.pixel_sums[n * out_channels + o]);
    from_acc(sum, a.grad_bias + i);
    return;
  }
  // Threads stand in slots of `width` kernels; every slot adds up some parts, and some outputs of the bias' part.
  auto* const sums = reinterpret_cast<acc_t*>(dynamic_shared());
  const int64_t n = blockIdx.x;
  const int width = num_kernels < kFinishThreads ? int(num_kernels) : kFinishThreads;
  int slots = 1;
  while (2 * slots * width <= kFinishThreads) slots *= 2;
  const int slot = int(threadIdx.x) / width;
  acc_t* const own_dots = a.dots + n * num_kernels;
  const int64_t part_size = a.bank.batch * num_kernels;
  for (int64_t first = 0; first < num_kernels; first += width) {
    const int64_t k = first + threadIdx.x % unsigned(width);
    acc_t sum = 0;
    if (slot < slots && k < num_kernels) {
      for (int64_t part = slot; part < a.parts; part += slots) sum += own_dots[part * part_size + k];
      if (a.pixel_sums != nullptr)
        for (int64_t o = slot; o < out_channels; o += slots)
          sum += to_acc(a.bias[k * out_channels + o]) * to_acc(a.pixel_sums[n * out_channels + o]);
    }
    sums[threadIdx.x] = sum;
    for (int step = slots / 2; step > 0; step /= 2) {
      __syncthreads();
      if (slot < step) sums[threadIdx.x] += sums[threadIdx.x + step * width];
    }
    // In the parts' own place, whatever the number of kernels: shared memory has not room for any. All of them were read.
    if (slot == 0 && k < num_kernels) own_dots[k] = sums[threadIdx.x];
  }
  __syncthreads();
  for (int64_t k = threadIdx.x; k < num_kernels; k += kFinishThreads)
    a.grad_attention.write(n * num_kernels + k, grad_attention(a.bank, a.mix + n * num_kernels, own_dots, k));
}

template <class storage_t, class sums_t>
cudaError_t finish(const KernelBankParams& p, void* dots, int64_t parts, const void* bias, const void* pixel_sums,
                   const void* mix, void* grad_bias, void* grad_attention, StorageType attention_type,
                   cudaStream_t stream) {
  using acc_t = acc_of<storage_t>;
  const int64_t attention_blocks = grad_attention == nullptr ? 0 : p.batch;
  const FinishArguments<storage_t, sums_t> a{p,
                                             static_cast<acc_t*>(dots),
                                             parts,
                                             static_cast<const storage_t*>(bias),
                                             static_cast<const sums_t*>(pixel_sums),
                                             static_cast<const acc_t*>(mix),
                                             static_cast<storage_t*>(grad_bias),
                                             {grad_attention, attention_type},
                                             attention_blocks};
  const int64_t bias_blocks = grad_bias == nullptr ? 0 : ceil_div(p.num_kernels * p.out_channels, kFinishThreads);
  return launch(finish_attention_kernel<storage_t, sums_t>, attention_blocks + bias_blocks, kFinishThreads,
                kFinishThreads * sizeof(acc_t), stream, a);
}

}  // namespace
}  // namespace dynamic_cuda

// ------------------------------------------------------------------------------------------------------- launchers

cudaError_t launch_mixing_weights(Precision precision, const KernelBankParams& p, const void* attention,
                                  StorageType attention_type, void* mix, cudaStream_t stream) {
  using namespace dynamic_cuda;
  auto run = [&](auto acc) {
    using acc_t = decltype(acc);
    return launch(mixing_weights_kernel<acc_t>, ceil_div(p.batch, kThreads), kThreads, 0, stream, p,
                  ScalarReader<acc_t>{attention, attention_type}, static_cast<acc_t*>(mix));
  };
  return precision == Precision::float64 ? run(double()) : run(float());
}

cudaError_t launch_aggregate_kernels(Precision precision, const KernelBankParams& p, const void* weight, const void* bias,
                                     const void* mix, void* kernels, void* biases, cudaStream_t stream) {
  using namespace dynamic_cuda;
  return dispatch_storage(precision, [&](auto number) {
    using storage_t = decltype(number);
    AggregateArguments<storage_t> a{};
    a.batch = p.batch, a.num_kernels = p.num_kernels, a.out_channels = p.out_channels, a.size = p.kernel_size();
    a.weight = static_cast<const storage_t*>(weight), a.bias = static_cast<const storage_t*>(bias);
    a.mix = static_cast<const acc_of<storage_t>*>(mix);
    a.kernels = static_cast<storage_t*>(kernels), a.biases = static_cast<storage_t*>(biases);
    return dispatch_vectors<storage_t, kChunk<storage_t>>(a.size, {weight, kernels}, [&](auto vectors) {
      constexpr bool v = decltype(vectors)::value;
      return p.batch == 1 ? launch_aggregate<storage_t, v, 1>(a, stream) : launch_aggregate<storage_t, v, 8>(a, stream);
    });
  });
}

int64_t aggregate_kernels_backward_workspace(Precision precision, const KernelBankParams& p, bool wants_attention) {
  using namespace dynamic_cuda;
  if (!wants_attention) return 0;
  return dispatch_storage(precision, [&](auto number) {
    using storage_t = decltype(number);
    return backward_blocks<storage_t>(p) * p.batch * p.num_kernels * int64_t(sizeof(acc_of<storage_t>));
  });
}

cudaError_t launch_aggregate_kernels_backward(Precision precision, const KernelBankParams& p, const void* grad_kernels,
                                              const void* grad_biases, const void* weight, const void* bias,
                                              const void* mix, void* grad_weight, void* grad_bias, void* grad_attention,
                                              StorageType attention_type, void* workspace, cudaStream_t stream) {
  using namespace dynamic_cuda;
  return dispatch_storage(precision, [&](auto number) -> cudaError_t {
    using storage_t = decltype(number);
    using acc_t = acc_of<storage_t>;
    if (grad_weight != nullptr || grad_attention != nullptr) {
      const AggregateBackwardArguments<storage_t> a{p.batch,
                                                    p.num_kernels,
                                                    p.kernel_size(),
                                                    static_cast<const storage_t*>(grad_kernels),
                                                    static_cast<const storage_t*>(weight),
                                                    static_cast<const acc_t*>(mix),
                                                    static_cast<storage_t*>(grad_weight),
                                                    grad_attention == nullptr ? nullptr : static_cast<acc_t*>(workspace)};
      switch (held_kernels(p)) {
        case 4: DYNCONV_RETURN_IF_ERROR((launch_aggregate_backward<storage_t, 4>(a, stream))); break;
        case 8: DYNCONV_RETURN_IF_ERROR((launch_aggregate_backward<storage_t, 8>(a, stream))); break;
        default: DYNCONV_RETURN_IF_ERROR((launch_aggregate_backward<storage_t, 16>(a, stream)));
      }
    }
    return finish<storage_t, storage_t>(p, workspace, backward_blocks<storage_t>(p), bias, grad_biases, mix, grad_bias,
                                        grad_attention, attention_type, stream);
  });
}

cudaError_t launch_finish_attention(Precision precision, const KernelBankParams& p, void* dots, int64_t parts,
                                    const void* bias, const void* pixel_sums, const void* mix, void* grad_bias,
                                    void* grad_attention, StorageType attention_type, cudaStream_t stream) {
  using namespace dynamic_cuda;
  return dispatch_storage(precision, [&](auto number) {
    using storage_t = decltype(number);
    return finish<storage_t, acc_of<storage_t>>(p, dots, parts, bias, pixel_sums, mix, grad_bias, grad_attention,
                                                attention_type, stream);
  });
}

}  // namespace dynconv
