// Batch normalisation (Ioffe, Szegedy 2015) and ReLU, forward and backward.
//   y = relu((x - mean) * factor + bias),  factor = weight / sqrt(var + eps),  mean and var over N, H, W (training) or
//   running (inference)
//   dx = factor (g - mean(g) - (x - mean) / (var + eps) * mean(g (x - mean))) in training, factor g in inference, where
//   g has passed ReLU's mask, recomputed from x
//   input, output, grad, grad_input [N, C, H, W] in one memory format; float, bfloat16 or float16; computed in float
//   mean, var, weight, bias, grad_weight, grad_bias [C]; float
// A column is kVec channels in channels_last, with a vector at each pixel, or one channel in NCHW, with a vector of
// each kVec pixels. A block takes a few columns of one part of the batch, and each row of its threads every rows-th
// vector. What a block finds is combined over its rows, and then, by another kernel, over the parts: both in an order
// that depends on nothing but the tensor's sizes.
#include "images.cuh"

namespace alexnet_kernels {
namespace {

constexpr int kBlocks = 2048;     // of a launch, at most, where there are no more columns than that
constexpr int kBlockBytes = 128;  // that the columns of a block take at a pixel, at most: a cache line

// Vectors that a thread loads together.
template <int kVec>
constexpr int kTogether = kVec == 1 ? 8 : 4;

// How the batch is shared out to blocks.
struct Split {
  Split(const IntList& size, MemoryFormat format, int vector, int vector_bytes, int together)
      : C(int(size[1])),
        channels_last(format == MemoryFormat::ChannelsLast),
        values(channels_last ? 1 : vector),
        columns(channels_last ? C / vector : C),
        plane(size[2] * size[3] / values),
        length(size[0] * plane.value()),
        groups(channels_last ? divide_up(columns, kBlockBytes / vector_bytes) : C),
        width(divide_up(columns, groups.value())),
        image(C * size[2] * size[3]),
        across(channels_last ? vector : int(size[2] * size[3])),
        along(channels_last ? C : vector) {
    rows = kThreads / width.value();
    for (int power = 1; power < rows; power *= 2) half = power;
    const int64_t tile = int64_t(rows) * together, most = std::max(1, kBlocks / groups.value());
    part = tile * divide_up(length, tile * most);
    parts = divide_up(length, part);
    STD_TORCH_CHECK(std::max(image, part + tile + plane.value()) < (int64_t(1) << 31),
                    "alexnet_kernels: the CUDA kernels take images of fewer than 2^31 elements");
  }

  int64_t blocks() const { return parts * groups.value(); }

  // The values [C] at `p` that belong to a column's vector.
  template <int kVec>
  __device__ __forceinline__ void load_values(const float* p, int column, float (&out)[kVec]) const {
    if (channels_last) return load<kVec>(p + column * kVec, out);
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = p[column];
  }

  int C;
  bool channels_last;
  int values;  // of one channel in a vector
  int columns;
  Divisor plane;      // vectors of a column in an image
  int64_t length;     // vectors of a column
  Divisor groups;     // of columns: blocks for each part
  Divisor width;      // columns of a block
  int64_t image;      // elements of an image
  int across, along;  // elements from a column to the next, and from one of its vectors to the next
  int rows;           // of a block's threads
  int half = 0;       // the largest power of two below `rows`, if any
  int64_t part;       // vectors of a column in a part
  int64_t parts;
};

// A thread's column and the vectors of it that the thread takes.
template <int kVec>
class Walk {
 public:
  __device__ __forceinline__ explicit Walk(const Split& split) : split_(split) {
    part_ = split.groups.quotient(int(blockIdx.x));
    row_ = split.width.quotient(int(threadIdx.x));
    column_ = (int(blockIdx.x) - part_ * split.groups.value()) * split.width.value() + int(threadIdx.x) -
              row_ * split.width.value();
    exists_ = row_ < split.rows && column_ < split.columns;
    if (!exists_) column_ = 0;
    const int64_t first = part_ * split.part, n = first / split.plane.value();
    count_ = exists_ ? int(min(split.part, split.length - first)) : 0;
    ahead_ = int(first - n * split.plane.value());
    base_ = n * split.image + int64_t(column_) * split.across;
  }

  __device__ __forceinline__ int row() const { return row_; }
  __device__ __forceinline__ int column() const { return column_; }
  // Whether the thread has the results of its column to store.
  __device__ __forceinline__ bool leads() const { return exists_ && row_ == 0; }

  // Calls body(how many, offset of each) until the thread's vectors are done, with a constant for how many.
  template <class Body>
  __device__ __forceinline__ void run(const Body& body) const {
    constexpr int kMost = kTogether<kVec>;
    int i = row_;
    for (; i + (kMost - 1) * split_.rows < count_; i += kMost * split_.rows) {
      int64_t at[kMost];
#pragma unroll
      for (int j = 0; j < kMost; ++j) at[j] = offset(i + j * split_.rows);
      body(std::integral_constant<int, kMost>{}, at);
    }
    for (; i < count_; i += split_.rows) {
      const int64_t at[1] = {offset(i)};
      body(std::integral_constant<int, 1>{}, at);
    }
  }

  // Stores two results of the column: of each of its channels in channels_last, else of the first.
  __device__ __forceinline__ void store_partial(const float (&first)[kVec], const float (&second)[kVec],
                                                float* partial) const {
    partial += 2 * int64_t(part_) * split_.C;
    if (split_.channels_last) {
      float pairs[2 * kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) pairs[2 * i] = first[i], pairs[2 * i + 1] = second[i];
      store<2 * kVec>(partial + 2 * column_ * kVec, pairs);
    } else {
      const float pair[2] = {first[0], second[0]};
      store<2>(partial + 2 * column_, pair);
    }
  }

 private:
  // Of vector i of the column's part.
  __device__ __forceinline__ int64_t offset(int i) const {
    const int n = split_.plane.quotient(ahead_ + i), in_plane = ahead_ + i - n * split_.plane.value();
    return base_ + n * split_.image + in_plane * split_.along;
  }

  const Split& split_;
  int part_, row_, column_, count_;
  int ahead_;  // of the part's first vector in its image, which begins at base_
  int64_t base_;
  bool exists_;
};

// Merges the states of a column's rows into its first row's. Every thread of the block must call it.
template <int kVec, class State>
__device__ __forceinline__ void merge_rows(const Split& split, const Walk<kVec>& walk, State& state) {
  __shared__ float memory[State::kFloats][kThreads];
  state.each([&](int i, float& value) { memory[i][threadIdx.x] = value; });
  for (int half = split.half; half > 0; half /= 2) {
    __syncthreads();
    if (walk.row() < half && walk.row() + half < split.rows) {
      State other;
      const int from = int(threadIdx.x) + half * split.width.value();
      other.each([&](int i, float& value) { value = memory[i][from]; });
      state.merge(other);
      state.each([&](int i, float& value) { memory[i][threadIdx.x] = value; });
    }
  }
}

// Mean and sum of squares around it of `count` vectors.
template <int kVec>
struct Moments {
  static constexpr int kFloats = 2 * kVec + 1;
  float mean[kVec] = {}, squares[kVec] = {}, count = 0.f;

  template <class Body>
  __device__ __forceinline__ void each(const Body& body) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) body(i, mean[i]), body(kVec + i, squares[i]);
    body(2 * kVec, count);
  }
  // Chan, Golub, LeVeque 1983.
  __device__ __forceinline__ void merge(const Moments& other) {
    const float total = count + other.count, share = other.count / max(total, 1.f), weight = count * share;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float delta = other.mean[i] - mean[i];
      mean[i] += delta * share;
      squares[i] += other.squares[i] + delta * weight * delta;
    }
    count = total;
  }
  template <int kCount>
  __device__ __forceinline__ void add(const float (&v)[kCount][kVec]) {
    Moments chunk;
    chunk.count = float(kCount);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      float sum = v[0][i];
#pragma unroll
      for (int j = 1; j < kCount; ++j) sum += v[j][i];
      chunk.mean[i] = sum * (1.f / float(kCount));
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float d = v[j][i] - chunk.mean[i];
        chunk.squares[i] += d * d;
      }
    }
    merge(chunk);
  }
  // Those of all places of the vectors, in the first.
  __device__ __forceinline__ void merge_places() {
#pragma unroll
    for (int i = 1; i < kVec; ++i) {
      const float delta = mean[i] - mean[0], share = 1.f / float(i + 1);
      mean[0] += delta * share;
      squares[0] += squares[i] + delta * (count * float(i) * share) * delta;
    }
  }
};

// Sums of the gradient and of the gradient times x - mean.
template <int kVec>
struct Sums {
  static constexpr int kFloats = 2 * kVec;
  float sum[kVec] = {}, product[kVec] = {};

  template <class Body>
  __device__ __forceinline__ void each(const Body& body) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) body(i, sum[i]), body(kVec + i, product[i]);
  }
  __device__ __forceinline__ void merge(const Sums& other) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] += other.sum[i], product[i] += other.product[i];
  }
  __device__ __forceinline__ void merge_places() {
#pragma unroll
    for (int i = 1; i < kVec; ++i) sum[0] += sum[i], product[0] += product[i];
  }
};

struct Parameters {
  const float *mean, *var, *weight, *bias;  // weight and bias may be null
  float eps;
};

// What a column's vectors are mapped by.
template <int kVec>
struct Affine {
  float mean[kVec], inverse_std[kVec], factor[kVec], bias[kVec];

  __device__ __forceinline__ Affine(const Split& split, const Parameters& p, int column) {
    split.load_values<kVec>(p.mean, column, mean);
    split.load_values<kVec>(p.var, column, inverse_std);
#pragma unroll
    for (int i = 0; i < kVec; ++i) factor[i] = 1.f, bias[i] = 0.f;
    if (p.weight != nullptr) split.load_values<kVec>(p.weight, column, factor);
    if (p.bias != nullptr) split.load_values<kVec>(p.bias, column, bias);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      inverse_std[i] = rsqrtf(inverse_std[i] + p.eps);
      factor[i] *= inverse_std[i];
    }
  }

  // What ReLU gets, of x - mean; the same bits forward and backward.
  __device__ __forceinline__ float normalised(float centred, int i) const { return fmaf(centred, factor[i], bias[i]); }
  __device__ __forceinline__ float masked(float g, float centred, int i) const {
    return normalised(centred, i) <= 0.f ? 0.f : g;
  }
};

// partial [parts, C, 2]: mean and sum of squares around it.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) moments_of_parts(Split split, const T* x, float* partial) {
  const Walk<kVec> walk(split);
  Moments<kVec> moments;
  walk.run([&](auto count, const auto& at) {
    float v[count][kVec];
#pragma unroll
    for (int j = 0; j < count; ++j) load<kVec>(x + at[j], v[j]);
    moments.add(v);
  });
  merge_rows(split, walk, moments);
  if (!walk.leads()) return;
  if (!split.channels_last) moments.merge_places();
  walk.store_partial(moments.mean, moments.squares, partial);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) normalise(Split split, Parameters parameters, const T* x, T* y) {
  const Walk<kVec> walk(split);
  const Affine<kVec> affine(split, parameters, walk.column());
  walk.run([&](auto count, const auto& at) {
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

// partial [parts, C, 2].
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    sums_of_parts(Split split, Parameters parameters, const T* grad, const T* x, float* partial) {
  const Walk<kVec> walk(split);
  const Affine<kVec> affine(split, parameters, walk.column());
  Sums<kVec> sums;
  walk.run([&](auto count, const auto& at) {
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
  merge_rows(split, walk, sums);
  if (!walk.leads()) return;
  if (!split.channels_last) sums.merge_places();
  walk.store_partial(sums.sum, sums.product, partial);
}

// inverse_count: 1 / (N H W) in training, 0 in inference.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    gradient(Split split, Parameters parameters, const float* grad_weight, const float* grad_bias, float inverse_count,
             const T* grad, const T* x, T* dx) {
  const Walk<kVec> walk(split);
  const Affine<kVec> affine(split, parameters, walk.column());
  float mean_g[kVec] = {}, slope[kVec] = {};
  if (inverse_count > 0.f) {
    split.load_values<kVec>(grad_bias, walk.column(), mean_g);
    split.load_values<kVec>(grad_weight, walk.column(), slope);
#pragma unroll
    for (int i = 0; i < kVec; ++i) mean_g[i] *= inverse_count, slope[i] *= affine.inverse_std[i] * inverse_count;
  }
  walk.run([&](auto count, const auto& at) {
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

// The kernels that combine parts: a block takes kChannels channels, with kLanes threads for each.
constexpr int kChannels = 4, kLanes = kThreads / kChannels;

// Adds up the lanes of a channel for its first one. Every thread of the block must call it.
__device__ __forceinline__ void add_lanes(double& a, double& b) {
  __shared__ double memory[2][kThreads];
  const int i = int(threadIdx.x);
  memory[0][i] = a, memory[1][i] = b;
  for (int step = kThreads / 2; step >= kChannels; step /= 2) {
    __syncthreads();
    if (i < step) memory[0][i] += memory[0][i + step], memory[1][i] += memory[1][i + step];
  }
  a = memory[0][i], b = memory[1][i];
}

// Parts of `count` pixels, `last` of them in the last.
__global__ void __launch_bounds__(kThreads) combine_moments(int channels, int64_t parts, double count, double last,
                                                            const float* partial, float* mean, float* var) {
  const int lane = int(threadIdx.x) / kChannels, c = int(blockIdx.x) * kChannels + int(threadIdx.x) % kChannels;
  // Sums around the first part's mean, in double, don't cancel.
  double centre = 0, sum = 0, squares = 0;
  if (c < channels) {
    centre = partial[2 * c];
#pragma unroll 8
    for (int64_t p = lane; p < parts; p += kLanes) {
      float pair[2];
      load<2>(partial + 2 * (p * channels + c), pair);
      const double n = p == parts - 1 ? last : count, delta = double(pair[0]) - centre;
      sum += n * delta;
      squares += double(pair[1]) + n * delta * delta;
    }
  }
  add_lanes(sum, squares);
  if (lane > 0 || c >= channels) return;
  const double total = count * double(parts - 1) + last, shift = sum / total, square = squares / total - shift * shift;
  mean[c] = float(centre + shift);
  var[c] = square < 0 ? 0.f : float(square);
}

__global__ void __launch_bounds__(kThreads) combine_sums(int channels, int64_t parts, float eps, const float* partial,
                                                         const float* var, float* grad_weight, float* grad_bias) {
  const int lane = int(threadIdx.x) / kChannels, c = int(blockIdx.x) * kChannels + int(threadIdx.x) % kChannels;
  double sum = 0, product = 0;
  if (c < channels) {
#pragma unroll 8
    for (int64_t p = lane; p < parts; p += kLanes) {
      float pair[2];
      load<2>(partial + 2 * (p * channels + c), pair);
      sum += double(pair[0]), product += double(pair[1]);
    }
  }
  add_lanes(sum, product);
  if (lane > 0 || c >= channels) return;
  grad_bias[c] = float(sum);
  grad_weight[c] = float(product) * rsqrtf(var[c] + eps);
}

// t [C] in float, as vectors can be loaded from it.
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

// Calls body with a value of the storage type, the constant size of its vectors and the Split for them.
template <class Body>
void for_split(const Tensor& x, const Tensor& grad, MemoryFormat format, const Body& body) {
  for_dtype(x, [&](auto t) {
    using T = decltype(t);
    const int64_t run = format == MemoryFormat::ChannelsLast ? x.size(1) : x.size(2) * x.size(3);
    const bool vectors = run % kVector<T> == 0 && aligned(data<T>(x), data<T>(grad));
    for_vector<T>(vectors ? kVector<T> : 1, [&](auto vector) {
      body(t, vector, Split(sizes_of(x), format, vector, vector * int(sizeof(T)), kTogether<vector>));
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& input, std::optional<Tensor> running_mean,
                                                   std::optional<Tensor> running_var, std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, bool training, double eps) {
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
  for_split(x, x, format, [&](auto t, auto vector, const Split& split) {
    using T = decltype(t);
    if (training) {
      Tensor partial = empty({split.parts, C, 2}, ScalarType::Float, x);
      device.launch(moments_of_parts<T, vector>, split.blocks(), kThreads, split, data<T>(x),
                    mutable_data<float>(partial));
      const int64_t last = split.length - (split.parts - 1) * split.part;
      device.launch(combine_moments, divide_up(C, kChannels), kThreads, C, split.parts, split.part * split.values,
                    last * split.values, data<float>(partial), mutable_data<float>(mean), mutable_data<float>(var));
    }
    device.launch(normalise<T, vector>, split.blocks(), kThreads, split, parameters_of(mean, var, w, b, eps),
                  data<T>(x), mutable_data<T>(output));
  });
  return {output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& grad, const Tensor& input, const Tensor& mean,
                                                            const Tensor& var, std::optional<Tensor> weight,
                                                            std::optional<Tensor> bias, bool training, double eps) {
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
  for_split(x, g, format, [&](auto t, auto vector, const Split& split) {
    using T = decltype(t);
    Tensor partial = empty({split.parts, C, 2}, ScalarType::Float, x);
    device.launch(sums_of_parts<T, vector>, split.blocks(), kThreads, split, parameters, data<T>(g), data<T>(x),
                  mutable_data<float>(partial));
    device.launch(combine_sums, divide_up(C, kChannels), kThreads, C, split.parts, eps, data<float>(partial),
                  data<float>(v), mutable_data<float>(grad_weight), mutable_data<float>(grad_bias));
    const double inverse_count = training ? double(C) / double(x.numel()) : 0.0;
    device.launch(gradient<T, vector>, split.blocks(), kThreads, split, parameters, data<float>(grad_weight),
                  data<float>(grad_bias), inverse_count, data<T>(g), data<T>(x), mutable_data<T>(grad_input));
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("batch_norm_relu", TORCH_BOX(&batch_norm_relu));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&batch_norm_relu_backward));
}

}  // namespace alexnet_kernels
