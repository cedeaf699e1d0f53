// What the kernels of the convolution's backward share: arguments, and the sum over the parts of the pixels.
#pragma once

#include "vector.cuh"

namespace alexnet_kernels::cuda {

// dw[k, m] = sum over the pixels p of y of g[p, k] x[window of p, m], m = (r, s, c); db[k] = sum of g[p, k]. All are in
// channels_last without gaps: x [N, H, W, groups C], g [N, OH, OW, groups K], dw [groups K, R, S, C], db [groups K].
// All sizes are positive; tensors have fewer than 2^31 elements.
struct WeightGradient {
  Tensor x, g, dw;
  std::optional<Tensor> db;  // null: it isn't computed
  int N, H, W, C, groups, K, R, S, OH, OW;
  int stride[2], padding[2];
};

// conv2d_relu_backward_weight_sm90a.cu: on compute capability 9.0. Null once it is launched, else why it does not take
// the convolution.
const char* weight_gradient_wgmma(const WeightGradient& c, const OnDevice& device);

// conv2d_relu_backward_weight_sm80.cu: bfloat16 and float16, any stride, padding and groups.
void weight_gradient_mma(const WeightGradient& c, const OnDevice& device);

// conv2d_relu_backward.cu: out[i] = the sum of partials[split * elements + i] over the splits, in float and in an order
// that depends on their number only, rounded to out's dtype. `partials` are float, on the device; out has `elements`
// elements without gaps.
void add_splits(const OnDevice& device, const float* partials, int splits, int64_t elements, Tensor& out);

// linear_relu_dropout.cu: scale times grad where output is positive, else 0.
Tensor relu_dropout_backward(const Tensor& grad, const Tensor& output, double scale);

}  // namespace alexnet_kernels::cuda
