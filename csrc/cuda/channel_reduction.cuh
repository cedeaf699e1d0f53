// Reductions over the pixels of a batch, channel by channel, for batch_norm_relu.cu: the partition of the batch into
// blocks, the reduction inside a block, and the states that are reduced. Every order is fixed by the tensor's sizes.
#pragma once

#include "image_layout.cuh"

namespace alexnet_kernels::cuda {

constexpr int kCombineLanes = kThreads / kCombineChannels;

// The partition of a batch into blocks. In channels_last a column is kVec channels, with one vector at each pixel; in
// NCHW it is one channel, with one vector for kVec pixels. A part is a range of vectors of every column. A block takes
// one part of a group of adjacent columns, and each row of its threads every rows-th vector of that part.
struct ChannelPartition {
  ChannelPartition(const IntList& size, MemoryFormat format, int vector, int vector_bytes, int in_flight)
      : C(int(size[1])),
        channels_last(format == MemoryFormat::ChannelsLast),
        values(channels_last ? 1 : vector),
        columns(channels_last ? C / vector : C),
        plane(size[2] * size[3] / values),
        long_plane(plane.value()),
        length(size[0] * plane.value()),
        groups(channels_last ? divide_up(columns, kPartitionBytes / vector_bytes) : C),
        width(divide_up(columns, groups.value())),
        image(C * size[2] * size[3]),
        across(channels_last ? vector : int(size[2] * size[3])),
        along(channels_last ? C : vector) {
    rows = kThreads / width.value();
    for (int power = 1; power < rows; power *= 2) half = power;
    const int64_t tile = int64_t(rows) * in_flight, most = std::max(1, kPartitionBlocks / groups.value());
    part = tile * divide_up(length, tile * most);
    parts = divide_up(length, part);
    STD_TORCH_CHECK(std::max(image, part + tile + plane.value()) < (int64_t(1) << 31),
                    "alexnet_kernels: the CUDA kernels take images of fewer than 2^31 elements");
  }

  int64_t blocks() const { return parts * groups.value(); }

  // The elements of p [C] for a column's vector.
  template <int kVec>
  __device__ __forceinline__ void load_values(const float* p, int column, float (&out)[kVec]) const {
    if (channels_last) return load<kVec>(p + column * kVec, out);
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = p[column];
  }

  int C;
  bool channels_last;
  int values;  // elements of one channel in a vector
  int columns;
  Divisor plane;  // vectors of a column in an image
  LongDivisor long_plane;
  int64_t length;     // vectors of a column
  Divisor groups;     // groups of columns: blocks of a part
  Divisor width;      // columns of a group
  int64_t image;      // elements of an image
  int across, along;  // elements from one column to the next, and from one vector of a column to the next
  int rows;           // of a block's threads
  int half = 0;       // the largest power of two below `rows`, or 0
  int64_t part;       // vectors of a column in a part
  int64_t parts;
};

// A thread's column, and the vectors of that column which the thread takes.
template <int kVec>
class ColumnIterator {
 public:
  __device__ __forceinline__ explicit ColumnIterator(const ChannelPartition& partition) : partition_(partition) {
    part_ = partition.groups.quotient(int(blockIdx.x));
    row_ = partition.width.quotient(int(threadIdx.x));
    column_ = (int(blockIdx.x) - part_ * partition.groups.value()) * partition.width.value() + int(threadIdx.x) -
              row_ * partition.width.value();
    valid_ = row_ < partition.rows && column_ < partition.columns;
    if (!valid_) column_ = 0;
    const int64_t first = part_ * partition.part, n = partition.long_plane.quotient(first);
    count_ = valid_ ? int(min(partition.part, partition.length - first)) : 0;
    first_in_plane_ = int(first - n * partition.plane.value());
    base_ = n * partition.image + int64_t(column_) * partition.across;
  }

  __device__ __forceinline__ int row() const { return row_; }
  __device__ __forceinline__ int column() const { return column_; }
  // Whether the thread stores the results of its column.
  __device__ __forceinline__ bool stores() const { return valid_ && row_ == 0; }

  // Calls body(count, offsets) for all vectors of the thread, kVectorsInFlight at a time, then one at a time. `count`
  // is a compile-time constant.
  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    constexpr int kCount = kVectorsInFlight<kVec>;
    int i = row_;
    for (; i + (kCount - 1) * partition_.rows < count_; i += kCount * partition_.rows) {
      int64_t at[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) at[j] = offset(i + j * partition_.rows);
      body(std::integral_constant<int, kCount>{}, at);
    }
    for (; i < count_; i += partition_.rows) {
      const int64_t at[1] = {offset(i)};
      body(std::integral_constant<int, 1>{}, at);
    }
  }

  // Stores the column's two results in partial [parts, C, 2]: of all its channels in channels_last, of the one in NCHW.
  __device__ __forceinline__ void store_partial(const float (&first)[kVec], const float (&second)[kVec],
                                                float* partial) const {
    partial += 2 * int64_t(part_) * partition_.C;
    if (partition_.channels_last) {
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
  // The offset of vector i of the column's part.
  __device__ __forceinline__ int64_t offset(int i) const {
    const int n = partition_.plane.quotient(first_in_plane_ + i),
              in_plane = first_in_plane_ + i - n * partition_.plane.value();
    return base_ + n * partition_.image + in_plane * partition_.along;
  }

  const ChannelPartition& partition_;
  int part_, row_, column_, count_;
  int first_in_plane_;  // the part's first vector, counted from the first vector of its plane
  int64_t base_;        // the offset of that plane's first vector
  bool valid_;
};

// Merges the states of a column's rows into the first row's through shared memory, as a tree in a fixed order. Every
// thread of the block must call it.
template <int kVec, class State>
__device__ __forceinline__ void merge_rows(const ChannelPartition& partition, const ColumnIterator<kVec>& iterator,
                                           State& state) {
  __shared__ float memory[State::kFloats][kThreads];
  state.each([&](int i, float& value) { memory[i][threadIdx.x] = value; });
  for (int half = partition.half; half > 0; half /= 2) {
    __syncthreads();
    if (iterator.row() < half && iterator.row() + half < partition.rows) {
      State other;
      const int from = int(threadIdx.x) + half * partition.width.value();
      other.each([&](int i, float& value) { value = memory[i][from]; });
      state.merge(other);
      state.each([&](int i, float& value) { memory[i][threadIdx.x] = value; });
    }
  }
}

// Sums a and b over the lanes of each channel, for lane 0, where thread i is lane i / kCombineChannels of channel
// i % kCombineChannels. Every thread of the block must call it.
__device__ __forceinline__ void sum_lanes(double& a, double& b) {
  __shared__ double memory[2][kThreads];
  const int i = int(threadIdx.x);
  memory[0][i] = a, memory[1][i] = b;
  for (int step = kThreads / 2; step >= kCombineChannels; step /= 2) {
    __syncthreads();
    if (i < step) memory[0][i] += memory[0][i + step], memory[1][i] += memory[1][i + step];
  }
  a = memory[0][i], b = memory[1][i];
}

// The mean of `count` vectors and the sum of squares around it.
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
  // Chan, Golub and LeVeque 1983.
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
  // Merges the moments of all elements of the vectors into the first element's.
  __device__ __forceinline__ void merge_elements() {
#pragma unroll
    for (int i = 1; i < kVec; ++i) {
      const float delta = mean[i] - mean[0], share = 1.f / float(i + 1);
      mean[0] += delta * share;
      squares[0] += squares[i] + delta * (count * float(i) * share) * delta;
    }
  }
};

// The sums of the gradient and of the gradient times x - mean.
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
  // Adds the sums of all elements of the vectors to the first element's.
  __device__ __forceinline__ void merge_elements() {
#pragma unroll
    for (int i = 1; i < kVec; ++i) sum[0] += sum[i], product[0] += product[i];
  }
};

}  // namespace alexnet_kernels::cuda
