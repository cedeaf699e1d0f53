// Batch normalisation (Ioffe, Szegedy 2015) and ReLU, forward and backward.
//   y = relu((x - mean) * factor + bias),  factor = weight / sqrt(var + eps),  mean and var over N, H, W (training) or
//   running (inference)
//   dx = factor (g - mean(g) - (x - mean) / (var + eps) * mean(g (x - mean))) in training, factor g in inference, where
//   g has passed ReLU's mask, recomputed from x
//   input, output, grad, grad_input [N, C, H, W] in one memory format; float, bfloat16 or float16; computed in float
//   mean, var, weight, bias, grad_weight, grad_bias [C]; float
// Sums over the batch are computed by parts (channel_reduction.cuh): a block reduces one part, and a second kernel
// combines the parts. The order of both depends on the tensor's sizes only.
#include "channel_reduction.cuh"

namespace alexnet_kernels::cuda {
namespace {

struct Parameters {
  const float *mean, *var, *weight, *bias;  // weight and bias may be null
  float eps;
};

// The map of a column's vectors from x - mean to the normalised values.
template <int kVec>
struct Affine {
  float mean[kVec], inverse_std[kVec], factor[kVec], bias[kVec];

  __device__ __forceinline__ Affine(const ChannelPartition& partition, const Parameters& p, int column) {
    partition.load_values<kVec>(p.mean, column, mean);
    partition.load_values<kVec>(p.var, column, inverse_std);
#pragma unroll
    for (int i = 0; i < kVec; ++i) factor[i] = 1.f, bias[i] = 0.f;
    if (p.weight != nullptr) partition.load_values<kVec>(p.weight, column, factor);
    if (p.bias != nullptr) partition.load_values<kVec>(p.bias, column, bias);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      inverse_std[i] = rsqrtf(inverse_std[i] + p.eps);
      factor[i] *= inverse_std[i];
    }
  }

  // The input of ReLU, of centred = x - mean. Forward and backward compute the same bits.
  __device__ __forceinline__ float normalised(float centred, int i) const { return fmaf(centred, factor[i], bias[i]); }
  __device__ __forceinline__ float masked(float g, float centred, int i) const {
    return normalised(centred, i) <= 0.f ? 0.f : g;
  }
};

// partial [parts, C, 2]: mean and sum of squares around it. One 16-byte load a vector.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) moments_of_parts(ChannelPartition partition, const T* x, float* partial) {
  const ColumnIterator<kVec> iterator(partition);
  Moments<kVec> moments;
  iterator.for_each([&](auto count, const auto& at) {
    float v[count][kVec];
#pragma unroll
    for (int j = 0; j < count; ++j) load<kVec>(x + at[j], v[j]);
    moments.add(v);
  });
  merge_rows(partition, iterator, moments);
  if (!iterator.stores()) return;
  if (!partition.channels_last) moments.merge_elements();
  iterator.store_partial(moments.mean, moments.squares, partial);
}

// One 16-byte load and store a vector.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    normalise(ChannelPartition partition, Parameters parameters, const T* x, T* y) {
  const ColumnIterator<kVec> iterator(partition);
  const Affine<kVec> affine(partition, parameters, iterator.column());
  iterator.for_each([&](auto count, const auto& at) {
    float v[count][kVec];
#pragma unroll
    for (int j = 0; j < count; ++j) load<kVec>(x + at[j], v[j]);
#pragma unroll
    for (int j = 0; j < count; ++j) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[j][i] = relu(affine.normalised(v[j][i] - affine.mean[i], i));
      store<kVec>(y + at[j], v[j]);
    }
  });
}

// partial [parts, C, 2]: the sums of channel_reduction.cuh's Sums. Two 16-byte loads a vector.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    sums_of_parts(ChannelPartition partition, Parameters parameters, const T* grad, const T* x, float* partial) {
  const ColumnIterator<kVec> iterator(partition);
  const Affine<kVec> affine(partition, parameters, iterator.column());
  Sums<kVec> sums;
  iterator.for_each([&](auto count, const auto& at) {
    float v[count][kVec], g[count][kVec];
#pragma unroll
    for (int j = 0; j < count; ++j) load<kVec>(x + at[j], v[j]), load<kVec>(grad + at[j], g[j]);
#pragma unroll
    for (int j = 0; j < count; ++j) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float centred = v[j][i] - affine.mean[i], masked = affine.masked(g[j][i], centred, i);
        sums.sum[i] += masked;
        sums.product[i] += masked * centred;
      }
    }
  });
  merge_rows(partition, iterator, sums);
  if (!iterator.stores()) return;
  if (!partition.channels_last) sums.merge_elements();
  iterator.store_partial(sums.sum, sums.product, partial);
}

// inverse_count: 1 / (N H W) in training, 0 in inference. Two 16-byte loads and one store a vector.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    gradient(ChannelPartition partition, Parameters parameters, const float* grad_weight, const float* grad_bias,
             float inverse_count, const T* grad, const T* x, T* dx) {
  const ColumnIterator<kVec> iterator(partition);
  const Affine<kVec> affine(partition, parameters, iterator.column());
  float mean_g[kVec] = {}, slope[kVec] = {};
  if (inverse_count > 0.f) {
    partition.load_values<kVec>(grad_bias, iterator.column(), mean_g);
    partition.load_values<kVec>(grad_weight, iterator.column(), slope);
#pragma unroll
    for (int i = 0; i < kVec; ++i) mean_g[i] *= inverse_count, slope[i] *= affine.inverse_std[i] * inverse_count;
  }
  iterator.for_each([&](auto count, const auto& at) {
    float v[count][kVec], g[count][kVec];
#pragma unroll
    for (int j = 0; j < count; ++j) load<kVec>(x + at[j], v[j]), load<kVec>(grad + at[j], g[j]);
#pragma unroll
    for (int j = 0; j < count; ++j) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float centred = v[j][i] - affine.mean[i];
        v[j][i] = affine.factor[i] * (affine.masked(g[j][i], centred, i) - (mean_g[i] + centred * slope[i]));
      }
      store<kVec>(dx + at[j], v[j]);
    }
  });
}

// Combines parts of `count` pixels; the last part has `last`. A block takes kCombineChannels channels.
__global__ void __launch_bounds__(kThreads) combine_moments(int channels, int64_t parts, double count, double last,
                                                            const float* partial, float* mean, float* var) {
  const int lane = int(threadIdx.x) / kCombineChannels;
  const int c = int(blockIdx.x) * kCombineChannels + int(threadIdx.x) % kCombineChannels;
  // Sums in double around the first part's mean avoid cancellation.
  double centre = 0, sum = 0, squares = 0;
  if (c < channels) {
    centre = partial[2 * c];
#pragma unroll 8
    for (int64_t p = lane; p < parts; p += kCombineLanes) {
      float pair[2];
      load<2>(partial + 2 * (p * channels + c), pair);
      const double n = p == parts - 1 ? last : count, delta = double(pair[0]) - centre;
      sum += n * delta;
      squares += double(pair[1]) + n * delta * delta;
    }
  }
  sum_lanes(sum, squares);
  if (lane > 0 || c >= channels) return;
  const double total = count * double(parts - 1) + last, shift = sum / total, square = squares / total - shift * shift;
  mean[c] = float(centre + shift);
  var[c] = square < 0 ? 0.f : float(square);
}

// Combines the parts' sums. A block takes kCombineChannels channels.
__global__ void __launch_bounds__(kThreads) combine_sums(int channels, int64_t parts, float eps, const float* partial,
                                                         const float* var, float* grad_weight, float* grad_bias) {
  const int lane = int(threadIdx.x) / kCombineChannels;
  const int c = int(blockIdx.x) * kCombineChannels + int(threadIdx.x) % kCombineChannels;
  double sum = 0, product = 0;
  if (c < channels) {
#pragma unroll 8
    for (int64_t p = lane; p < parts; p += kCombineLanes) {
      float pair[2];
      load<2>(partial + 2 * (p * channels + c), pair);
      sum += double(pair[0]), product += double(pair[1]);
    }
  }
  sum_lanes(sum, product);
  if (lane > 0 || c >= channels) return;
  grad_bias[c] = float(sum);
  grad_weight[c] = float(product) * rsqrtf(var[c] + eps);
}

// t [C] in float, contiguous and aligned to 16 bytes.
Tensor floats(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float && t.is_contiguous() && aligned(data<float>(t))) return t;
  Tensor out = empty({t.size(0)}, ScalarType::Float, t);
  torch::stable::copy_(out, t);
  return out;
}
std::optional<Tensor> floats(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(floats(*t)) : std::nullopt;
}

Parameters parameters_of(const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& bias, double eps) {
  return {data<float>(mean), data<float>(var), weight ? data<float>(*weight) : nullptr,
          bias ? data<float>(*bias) : nullptr, float(eps)};
}

// Calls body with a value of the storage type, the vector size as a constant, and the ChannelPartition.
template <class Body>
void for_partition(const Tensor& x, const Tensor& grad, MemoryFormat format, const Body& body) {
  for_dtype(x, [&](auto t) {
    using T = decltype(t);
    const int64_t run = format == MemoryFormat::ChannelsLast ? x.size(1) : x.size(2) * x.size(3);
    const bool vectors = run % kVector<T> == 0 && aligned(data<T>(x), data<T>(grad));
    for_vector<T>(vectors ? kVector<T> : 1, [&](auto vector) {
      body(t, vector, ChannelPartition(sizes_of(x), format, vector, vector * int(sizeof(T)), kVectorsInFlight<vector>));
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& input, std::optional<Tensor> running_mean,
                                                   std::optional<Tensor> running_var, std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, bool training, double eps) {
  const Operands given = operands("batch_norm_relu", "input", input);
  given.batch_norm(input, running_mean, running_var, weight, bias);
  if (!training) given.required("running_mean", running_mean), given.required("running_var", running_var);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  const int64_t C = x.size(1);
  Tensor output = empty(sizes_of(x), x.scalar_type(), x, format);
  Tensor mean = empty({C}, ScalarType::Float, x), var = empty({C}, ScalarType::Float, x);
  if (!training) {
    torch::stable::copy_(mean, *running_mean);
    torch::stable::copy_(var, *running_var);
  }
  if (x.numel() == 0) {
    if (training) torch::stable::zero_(mean), torch::stable::zero_(var);
    return {output, mean, var};
  }
  const OnDevice device(x);
  const std::optional<Tensor> w = floats(weight), b = floats(bias);
  for_partition(x, x, format, [&](auto t, auto vector, const ChannelPartition& partition) {
    using T = decltype(t);
    if (training) {
      Tensor partial = empty({partition.parts, C, 2}, ScalarType::Float, x);
      device.launch(moments_of_parts<T, vector>, partition.blocks(), kThreads, partition, data<T>(x),
                    mutable_data<float>(partial));
      const int64_t last = partition.length - (partition.parts - 1) * partition.part;
      device.launch(combine_moments, divide_up(C, kCombineChannels), kThreads, C, partition.parts,
                    partition.part * partition.values, last * partition.values, data<float>(partial),
                    mutable_data<float>(mean), mutable_data<float>(var));
    }
    device.launch(normalise<T, vector>, partition.blocks(), kThreads, partition, parameters_of(mean, var, w, b, eps),
                  data<T>(x), mutable_data<T>(output));
  });
  return {output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& grad, const Tensor& input, const Tensor& mean,
                                                            const Tensor& var, std::optional<Tensor> weight,
                                                            std::optional<Tensor> bias, bool training, double eps) {
  const Operands given = operands("batch_norm_relu_backward", "grad", grad);
  given.batch_norm(input, mean, var, weight, bias);
  given.alike("grad", grad, input);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format), g = in_format(grad, format);
  const int64_t C = x.size(1);
  Tensor grad_input = empty(sizes_of(x), x.scalar_type(), x, format);
  Tensor grad_weight = empty({C}, ScalarType::Float, x), grad_bias = empty({C}, ScalarType::Float, x);
  if (x.numel() == 0) {
    torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias);
    return {grad_input, grad_weight, grad_bias};
  }
  const OnDevice device(x);
  const Tensor m = floats(mean), v = floats(var);
  const std::optional<Tensor> w = floats(weight), b = floats(bias);
  const Parameters parameters = parameters_of(m, v, w, b, eps);
  for_partition(x, g, format, [&](auto t, auto vector, const ChannelPartition& partition) {
    using T = decltype(t);
    Tensor partial = empty({partition.parts, C, 2}, ScalarType::Float, x);
    device.launch(sums_of_parts<T, vector>, partition.blocks(), kThreads, partition, parameters, data<T>(g), data<T>(x),
                  mutable_data<float>(partial));
    device.launch(combine_sums, divide_up(C, kCombineChannels), kThreads, C, partition.parts, eps, data<float>(partial),
                  data<float>(v), mutable_data<float>(grad_weight), mutable_data<float>(grad_bias));
    const double inverse_count = training ? double(C) / double(x.numel()) : 0.0;
    device.launch(gradient<T, vector>, partition.blocks(), kThreads, partition, parameters, data<float>(grad_weight),
                  data<float>(grad_bias), inverse_count, data<T>(g), data<T>(x), mutable_data<T>(grad_input));
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("batch_norm_relu", TORCH_BOX(&batch_norm_relu));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&batch_norm_relu_backward));
}

}  // namespace alexnet_kernels::cuda
