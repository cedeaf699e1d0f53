// The schema of every operator, and the operators that describe the library itself.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "cpu/isa.h"

namespace alexnet_kernels::cpu {

namespace {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "generic";
  }
}

Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // ALEXNET_KERNELS_ISA lowers the choice, so that one machine can test every set of kernels.
  const char* variable = std::getenv("ALEXNET_KERNELS_ISA");
  const std::string limit = variable ? variable : "avx512";
  if (avx512 && limit == "avx512") return Isa::avx512;
  if (avx2 && limit != "generic") return Isa::avx2;
#endif
  return Isa::generic;
}

std::string isa() {
  return isa_name(current_isa());
}

// "sources=<digest of csrc> archs=<ALEXNET_KERNELS_ARCHS, or nothing without CUDA kernels>"
std::string build_info() {
#ifdef ALEXNET_BUILD
  return ALEXNET_BUILD;
#else
  return "sources= archs=";
#endif
}

}  // namespace

Isa current_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

}  // namespace alexnet_kernels::cpu

// The tests' emulation of CUDA registers the same operators in another namespace of torch.
#ifndef ALEXNET_NAMESPACE
#define ALEXNET_NAMESPACE alexnet_kernels
#endif
#define ALEXNET_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define ALEXNET_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

ALEXNET_LIBRARY(ALEXNET_NAMESPACE, m) {
  m.def("isa() -> str");
  m.def("build_info() -> str");

  m.def(
      "conv2d_relu(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int groups, bool relu, "
      "int algorithm=0, int backward_input=0, int backward_weight=0, bool masked_grad=False, bool mask_input=False) "
      "-> Tensor");
  m.def(
      "conv2d_relu_backward_input(Tensor grad, Tensor? output, Tensor input, Tensor weight, int[2] stride, "
      "int[2] padding, int groups, bool mask_input, int algorithm=0) -> Tensor");
  m.def(
      "conv2d_relu_backward_weight(Tensor grad, Tensor? output, Tensor input, Tensor weight, int[2] stride, "
      "int[2] padding, int groups, int algorithm=0) -> (Tensor grad_weight, Tensor grad_bias)");
  m.def("space_to_depth(Tensor input, int block, int[2] padding, int[2] size, ScalarType dtype) -> Tensor");
  m.def("depth_to_space(Tensor input, int block, int[2] padding, int[2] size, ScalarType dtype) -> Tensor");
  m.def("relu_dropout_backward(Tensor grad, Tensor output, float scale) -> Tensor");

  m.def(
      "max_pool2d(Tensor input, Tensor? bias, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
      "bool relu) -> (Tensor output, Tensor argmax)");
  m.def(
      "max_pool2d_backward(Tensor grad, Tensor argmax, Tensor? bias, int[] input_size, int[2] kernel_size, "
      "int[2] stride, int[2] padding) -> (Tensor grad_input, Tensor grad_bias)");

  m.def("local_response_norm(Tensor input, int size, float alpha, float beta, float k, int groups) -> Tensor");
  m.def(
      "local_response_norm_backward(Tensor grad, Tensor input, int size, float alpha, float beta, float k, "
      "int groups) -> Tensor");

  m.def(
      "lrn_max_pool2d(Tensor input, Tensor? bias, int size, float alpha, float beta, float k, int groups, "
      "int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, bool relu) "
      "-> (Tensor output, Tensor argmax)");
  m.def(
      "lrn_max_pool2d_backward(Tensor grad, Tensor input, Tensor? bias, Tensor argmax, int size, float alpha, "
      "float beta, float k, int groups, int[2] kernel_size, int[2] stride, int[2] padding, bool relu) "
      "-> (Tensor grad_input, Tensor grad_bias)");

  m.def("within_map_response_norm(Tensor input, int size, float alpha, float beta, float k) -> Tensor");
  m.def(
      "within_map_response_norm_backward(Tensor grad, Tensor input, int size, float alpha, float beta, float k) "
      "-> Tensor");

  m.def(
      "batch_norm_relu(Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, "
      "bool training, float eps) -> (Tensor output, Tensor mean, Tensor var)");
  m.def(
      "batch_norm_relu_backward(Tensor grad, Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
      "bool training, float eps) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  m.def(
      "dropout(Tensor input, float p, float scale, Tensor seed, int offset, int row, int row_stride, int base) "
      "-> Tensor");
  m.def(
      "linear_relu_dropout(Tensor input, Tensor weight, Tensor? bias, bool relu, float p, float scale, Tensor seed, "
      "int offset, int row, int row_stride, int base) -> Tensor");

  m.def(
      "sgd_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] masters, float lr, "
      "float momentum, float weight_decay, float dampening, bool nesterov, bool paper_rule, bool first_step, "
      "Tensor? lr_tensor=None) -> ()");

  m.def(
      "augment(Tensor images, Tensor crops, int[2] size, Tensor? flips, Tensor? color_shift, Tensor? mean, "
      "Tensor? scale, ScalarType dtype, bool channels_last) -> Tensor");
}

ALEXNET_LIBRARY_IMPL(ALEXNET_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&alexnet_kernels::cpu::isa));
  m.impl("build_info", TORCH_BOX(&alexnet_kernels::cpu::build_info));
}
