// Checks of an operator's operands. The functions of alexnet_kernels/ops refuse more, in the user's terms; a call
// through torch.ops comes here directly. No check reads a tensor's elements.
#pragma once

#include <limits>
#include <string>

#include "pool.h"
#include "tensor.h"

namespace alexnet_kernels {

using torch::headeronly::DeviceType;

// The operands of one call. The first tensor must be on a device of the kernels' type, all others on the same device.
class Operands {
 public:
  Operands(const char* op, const char* name, const Tensor& first, DeviceType type) : op_(op), device_(first.device()) {
    STD_TORCH_CHECK(device_.type() == type, op, ": ", name, " is on another type of device than the kernels");
    storage(name, first);
  }

  // A tensor on the device, whose memory holds all its elements.
  void tensor(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.device() == device_, op_, ": ", name, " is on another device than the first tensor");
    storage(name, t);
  }
  void tensor(const char* name, const Tensor& t, ScalarType type) const {
    tensor(name, t);
    STD_TORCH_CHECK(t.scalar_type() == type, op_, ": ", name, " has dtype ", int(t.scalar_type()),
                    ", but the operator takes ", int(type), " (numbers of torch's ScalarType)");
  }
  void tensor(const char* name, const Tensor& t, ScalarType type, const IntList& sizes) const {
    tensor(name, t, type);
    STD_TORCH_CHECK(same(t, sizes), op_, ": ", name, " is ", text(sizes_of(t)), ", not ", text(sizes));
  }
  const Tensor& required(const char* name, const std::optional<Tensor>& t) const {
    STD_TORCH_CHECK(t.has_value(), op_, ": ", name, " is None");
    return *t;
  }
  // Of one dtype and shape.
  void alike(const char* name, const Tensor& t, const Tensor& other) const {
    tensor(name, t, other.scalar_type(), sizes_of(other));
  }
  // [N, C, H, W] in a floating-point dtype.
  void images(const char* name, const Tensor& t) const {
    tensor(name, t);
    dimensions(name, t, 4);
    dtype_of(t);
  }
  void dimensions(const char* name, const Tensor& t, int64_t count) const {
    STD_TORCH_CHECK(t.dim() == count, op_, ": ", name, " has ", t.dim(), " dimensions, not ", count);
  }
  // [C] in a floating-point dtype.
  void channels(const char* name, const Tensor& t, int64_t count) const {
    tensor(name, t);
    dtype_of(t);
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == count, op_, ": ", name, " is ", text(sizes_of(t)), ", not [", count,
                    "]");
  }
  void channels(const char* name, const std::optional<Tensor>& t, int64_t count) const {
    if (t) channels(name, *t, count);
  }
  // The bias of maps of so many channels: in their dtype or, where that has 16 bits, in float32.
  void map_bias(const std::optional<Tensor>& bias, ScalarType type, int64_t count) const {
    channels("bias", bias, count);
    const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
    if (bias && !(half && bias->scalar_type() == ScalarType::Float)) tensor("bias", *bias, type);
  }
  // One element of a dtype.
  void one(const char* name, const Tensor& t, ScalarType type) const {
    tensor(name, t, type);
    STD_TORCH_CHECK(t.numel() == 1, op_, ": ", name, " has ", t.numel(), " elements, not 1");
  }

  void number(const char* name, int64_t value, int64_t least, int64_t most) const {
    STD_TORCH_CHECK(least <= value && value <= most, op_, ": ", name, " is ", value, ", not from ", least, " to ",
                    most);
  }
  void positive(const char* name, int64_t value) const {
    STD_TORCH_CHECK(value > 0, op_, ": ", name, " is ", value, ", not positive");
  }
  // Two integers.
  void pair(const char* name, const IntList& values, int64_t least, int64_t most = kMost) const {
    STD_TORCH_CHECK(values.size() == 2, op_, ": ", name, " has ", values.size(), " elements, not 2");
    for (const int64_t value : values) number(name, value, least, most);
  }
  // An array without gaps, in the order of another one of its shape.
  void laid_out_like(const char* name, const Tensor& t, const Tensor& other) const {
    tensor(name, t);
    const auto sizes = t.sizes(), expected = other.sizes(), strides = t.strides(), expected_strides = other.strides();
    bool equal = sizes.size() == expected.size();
    for (size_t d = 0; equal && d < sizes.size(); ++d) {
      equal = sizes[d] == expected[d] && (sizes[d] == 1 || strides[d] == expected_strides[d]);
    }
    STD_TORCH_CHECK(equal, op_, ": ", name, " is ", text(sizes_of(t)), ", not ", text(sizes_of(other)),
                    ", or has other strides");
  }

  // The windows of a pool. A position in one is a byte.
  void windows(const IntList& kernel, const IntList& stride, const IntList& padding) const {
    pair("kernel_size", kernel, 1, 256);
    pair("stride", stride, 1);
    pair("padding", padding, 0);
    for (const int d : {0, 1}) {
      STD_TORCH_CHECK(2 * padding[d] <= kernel[d], op_, ": padding is ", padding[d], ", more than half the kernel of ",
                      kernel[d]);
    }
    STD_TORCH_CHECK(kernel[0] * kernel[1] <= 256, op_, ": a window has ", kernel[0] * kernel[1],
                    " pixels, more than 256");
  }
  // With ReLU, one byte is no position.
  void room_for_nowhere(const IntList& kernel) const {
    STD_TORCH_CHECK(kernel[0] * kernel[1] <= 255, op_, ": a window has ", kernel[0] * kernel[1],
                    " pixels, more than 255, with relu");
  }
  // The sizes of the pool of images of these sizes.
  IntList pooled(const IntList& size, const IntList& kernel, const IntList& stride, const IntList& padding,
                 bool ceil_mode) const {
    windows(kernel, stride, padding);
    const IntList result = pooled_sizes(size, kernel, stride, padding, ceil_mode);
    STD_TORCH_CHECK(size[2] > 0 && size[3] > 0 && result[2] > 0 && result[3] > 0, op_, ": images of ", size[2], " x ",
                    size[3], " are smaller than the window");
    return result;
  }
  // A floating-point gradient, and an argmax, of the pool of images of these sizes.
  void pool_gradient(const Tensor& grad, const Tensor& argmax, const IntList& size, const IntList& kernel,
                     const IntList& stride, const IntList& padding) const {
    images("grad", grad);
    STD_TORCH_CHECK(size.size() == 4, op_, ": the input's size has ", size.size(), " elements, not 4");
    for (const int64_t extent : size) number("the input's size", extent, 0, std::numeric_limits<int64_t>::max());
    windows(kernel, stride, padding);
    const IntList floor = pooled_sizes(size, kernel, stride, padding, false),
                  ceil = pooled_sizes(size, kernel, stride, padding, true);
    for (const int d : {0, 1, 2, 3}) {
      STD_TORCH_CHECK(grad.size(d) == floor[d] || grad.size(d) == ceil[d], op_, ": grad is ", text(sizes_of(grad)),
                      ", not ", text(floor), " or, with ceil_mode, ", text(ceil));
    }
    tensor("argmax", argmax, ScalarType::Byte, sizes_of(grad));
  }
  // Windows of `size` channels inside towers of equally many channels.
  void towers(int64_t size, int64_t groups, int64_t channels) const {
    positive("size", size);
    STD_TORCH_CHECK(groups > 0 && channels % groups == 0, op_, ": groups is ", groups, ", which does not divide ",
                    channels, " channels");
  }
  // Blocks of pixels as channels, of a result of `size` pixels. channels: of the blocks, if they are given.
  void blocks(int64_t block, const IntList& padding, const IntList& size, int64_t channels = 0) const {
    number("block", block, 1, 1 << 15);
    pair("padding", padding, 0);
    pair("size", size, 0);
    STD_TORCH_CHECK(channels % (block * block) == 0, op_, ": ", channels, " channels are not of blocks of ", block,
                    " x ", block);
  }
  // What torch's GEMM does not check itself.
  void linear(const Tensor& weight, const std::optional<Tensor>& bias) const {
    tensor("weight", weight);
    dimensions("weight", weight, 2);
    channels("bias", bias, weight.size(0));
  }
  // What torch's convolution does not check itself.
  void convolution(const Tensor& weight, const std::optional<Tensor>& bias, const IntList& stride,
                   const IntList& padding) const {
    images("weight", weight);
    channels("bias", bias, weight.size(0));
    pair("stride", stride, 1);
    pair("padding", padding, 0);
  }
  // What the kernels of its gradients take. `output` may be null.
  void convolution_gradient(const Tensor& grad, const std::optional<Tensor>& output, const Tensor& input,
                            const Tensor& weight, const IntList& stride, const IntList& padding, int64_t groups) const {
    images("input", input);
    convolution(weight, std::nullopt, stride, padding);
    tensor("weight", weight, input.scalar_type());
    number("groups", groups, 1, kMost);
    STD_TORCH_CHECK(weight.size(0) % groups == 0 && weight.size(1) * groups == input.size(1), op_, ": weight is ",
                    text(sizes_of(weight)), ", which does not fit ", groups, " groups of ", input.size(1), " channels");
    IntList size = {input.size(0), weight.size(0), 0, 0};
    for (const int d : {0, 1}) {
      const int64_t span = input.size(2 + d) + 2 * padding[d] - weight.size(2 + d);
      STD_TORCH_CHECK(weight.size(2 + d) > 0 && span >= 0, op_, ": weight is ", text(sizes_of(weight)),
                      ", whose kernel does not fit an image of ", input.size(2), " x ", input.size(3));
      size[2 + d] = span / stride[d] + 1;
    }
    tensor("grad", grad, input.scalar_type(), size);
    if (output) tensor("output", *output, input.scalar_type(), size);
  }
  // Images, and values of their channels.
  void batch_norm(const Tensor& input, const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                  const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) const {
    images("input", input);
    channels("the mean", mean, input.size(1));
    channels("the variance", var, input.size(1));
    channels("weight", weight, input.size(1));
    channels("bias", bias, input.size(1));
  }
  // Probability, and rows of `row` elements each, as dropout takes them.
  void dropout(double p, const Tensor& seed, int64_t count, int64_t row) const {
    STD_TORCH_CHECK(p >= 0 && p <= 1, op_, ": p is ", p, ", not from 0 to 1");
    one("seed", seed, ScalarType::Long);
    STD_TORCH_CHECK(count == 0 || (row > 0 && count % row == 0), op_, ": row is ", row, ", which does not divide ",
                    count, " elements");
  }
  void augment(const Tensor& images, const Tensor& crops, const IntList& size, const std::optional<Tensor>& flips,
               const std::optional<Tensor>& shift, const std::optional<Tensor>& mean,
               const std::optional<Tensor>& scale) const {
    tensor("images", images, ScalarType::Byte);
    dimensions("images", images, 4);
    const IntList whole = sizes_of(images);
    const int64_t N = whole[0], C = whole[3];
    pair("size", size, 1);
    number("the height of a crop", size[0], 1, whole[1]);
    number("the width of a crop", size[1], 1, whole[2]);
    tensor("crops", crops, ScalarType::Long, {N, 2});
    if (flips) tensor("flips", *flips, ScalarType::Bool, {N});
    if (shift) {
      tensor("color_shift", *shift);
      dtype_of(*shift);
      STD_TORCH_CHECK(same(*shift, {N, C}), op_, ": color_shift is ", text(sizes_of(*shift)), ", not ", text({N, C}));
    }
    channels("scale", scale, C);
    if (mean) {
      tensor("mean", *mean);
      dtype_of(*mean);
      STD_TORCH_CHECK(same(*mean, {C}) || same(*mean, {C, size[0], size[1]}) || same(*mean, {C, whole[1], whole[2]}),
                      op_, ": mean is ", text(sizes_of(*mean)), ", not of colours, of a crop or of an image");
    }
  }
  // Lists of tensors, of which those of one index are arrays of one layout, of dtypes that go together.
  void sgd(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& momentum,
           const std::vector<Tensor>& masters) const {
    STD_TORCH_CHECK(grads.size() == params.size() && momentum.size() == params.size() &&
                        (masters.empty() || masters.size() == params.size()),
                    op_, ": ", params.size(), " params, ", grads.size(), " grads, ", momentum.size(),
                    " momentum buffers and ", masters.size(), " masters");
    for (size_t i = 0; i < params.size(); ++i) {
      const Tensor& param = params[i];
      tensor("a param", param);
      STD_TORCH_CHECK(param.is_contiguous() || (param.dim() == 4 && has_channels_last_strides(param)), op_, ": params[",
                      i, "] is neither contiguous nor in channels_last");
      laid_out_like("a gradient", grads[i], param);
      laid_out_like("a momentum buffer", momentum[i], param);
      const bool wide = dtype_of(param) == DType::f64;
      const DType computed = wide ? DType::f64 : DType::f32, held = dtype_of(momentum[i]);
      bool fits = (dtype_of(grads[i]) == DType::f64) == wide && (held == computed || held == dtype_of(param));
      if (!masters.empty()) {
        laid_out_like("a master", masters[i], param);
        fits = fits && dtype_of(masters[i]) == computed;
      }
      STD_TORCH_CHECK(fits, op_, ": the dtypes of params[", i, "] and its gradient, momentum or master don't agree");
    }
  }

  static IntList pooled_sizes(const IntList& size, const IntList& kernel, const IntList& stride, const IntList& padding,
                              bool ceil_mode) {
    return {size[0], size[1], pooled_size(size[2], kernel[0], stride[0], padding[0], ceil_mode),
            pooled_size(size[3], kernel[1], stride[1], padding[1], ceil_mode)};
  }
  static bool same(const Tensor& t, const IntList& sizes) {
    const auto given = t.sizes();
    return std::equal(given.begin(), given.end(), sizes.begin(), sizes.end());
  }
  static std::string text(const IntList& sizes) {
    std::string all = "[";
    for (const int64_t size : sizes) all += (all.size() > 1 ? ", " : "") + std::to_string(size);
    return all + "]";
  }

  // The largest size, stride or padding: products with another of them fit 64 bits.
  static constexpr int64_t kMost = (int64_t(1) << 31) - 1;

 private:
  // torch's own operators raise for a tensor whose memory was freed (FSDP frees parameters so).
  void storage(const char* name, const Tensor& t) const {
    int64_t held = 0, offset = 0, last = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
    const auto sizes = t.sizes(), strides = t.strides();
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 0) return;
      last += (sizes[d] - 1) * strides[d];
    }
    STD_TORCH_CHECK(held >= (offset + last + 1) * int64_t(t.element_size()), op_, ": the memory of ", name,
                    " was freed, or is smaller than the tensor");
  }

  const char* op_;
  torch::stable::Device device_;
};

}  // namespace alexnet_kernels
