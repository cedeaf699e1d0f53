// Dropout whose mask is a function of (seed, offset) and each element's index in the whole tensor, in row-major order
// for every memory format. No mask is stored: backward is the same operator on the gradient. A shard has the mask of
// its part of the whole tensor.
//   input, output: any shape; element i of row r (of `row` elements) has index base + r * row_stride + i
// A task is at most kDropoutTaskElements of one row; channels_last: one image.
#include <vector>

#include "dropout_mask.h"
#include "tasks.h"

namespace alexnet_kernels::cpu {

struct DropoutArgs {
  DType dtype;
  Dropout dropout;
  bool channels_last;
  int64_t row, row_stride, base;
  int64_t tasks_per_row;
  int64_t channels, pixels;  // of an image (channels_last)
  const void* input;
  void* output;
};

namespace ALEXNET_ISA {
namespace {

template <class T>
void rows(const DropoutArgs& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.input);
  T* y = static_cast<T*>(a.output);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t r = task / a.tasks_per_row, first = task % a.tasks_per_row * kDropoutTaskElements;
    const int64_t count = std::min(kDropoutTaskElements, a.row - first);
    dropout_run<false>(a.dropout, index_of(a.base, a.row_stride, r, first), count, x + r * a.row + first,
                       y + r * a.row + first);
  }
}

template <class T>
void images(const DropoutArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(a.input);
  T* y = static_cast<T*>(a.output);
  const int64_t image = a.channels * a.pixels;
  std::vector<A> ones(image, A(1)), factor(image);
  for (int64_t n = begin; n < end; ++n) {
    // In row-major order, element (c, p) of the image is number n * image + c * pixels + p. Rows may end inside an
    // image.
    for (int64_t done = 0; done < image;) {
      const int64_t logical = n * image + done, r = logical / a.row, i = logical % a.row;
      const int64_t count = std::min(a.row - i, image - done);
      dropout_run<false>(a.dropout, index_of(a.base, a.row_stride, r, i), count, ones.data() + done,
                         factor.data() + done);
      done += count;
    }
    for (int64_t p = 0; p < a.pixels; ++p) {
      for (int64_t c = 0; c < a.channels; ++c) {
        const int64_t at = n * image + p * a.channels + c;
        const A keep = factor[c * a.pixels + p];
        y[at] = keep == 0 ? T(0) : T(A(x[at]) * keep);
      }
    }
  }
}

}  // namespace

void dropout_forward(const DropoutArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype,
            [&](auto t) { a.channels_last ? images<decltype(t)>(a, begin, end) : rows<decltype(t)>(a, begin, end); });
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu

#ifdef ALEXNET_REGISTER
#include "operator.h"

namespace alexnet_kernels::cpu {
ALEXNET_DECLARE_KERNEL(dropout_forward, DropoutArgs)

namespace {

Tensor dropout(const Tensor& input, double p, double scale, const Tensor& seed, int64_t offset, int64_t row,
               int64_t row_stride, int64_t base) {
  operands("dropout", "input", input).dropout(p, seed, input.numel(), row);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  Tensor output = empty(sizes_of(x), x.scalar_type(), x, format);
  if (x.numel() == 0) return output;
  const int64_t key = *static_cast<const int64_t*>(seed.const_data_ptr());
  DropoutArgs args{dtype_of(x),
                   make_dropout(p, scale, key, offset),
                   format == MemoryFormat::ChannelsLast,
                   row,
                   row_stride,
                   base,
                   (row + kDropoutTaskElements - 1) / kDropoutTaskElements,
                   0,
                   0,
                   x.const_data_ptr(),
                   output.mutable_data_ptr()};
  int64_t tasks = x.numel() / row * args.tasks_per_row;
  if (args.channels_last) {
    args.channels = x.size(1), args.pixels = x.size(2) * x.size(3);
    tasks = x.size(0);
  }
  run(pick_dropout_forward(), args, tasks, x.numel() * 16);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout));
}

}  // namespace alexnet_kernels::cpu
#endif
