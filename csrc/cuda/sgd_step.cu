// One step of stochastic gradient descent with momentum over a list of tensors, in place, one launch for up to
// kSgdTensors of them.
//   paper (Krizhevsky et al. 2012, section 5):  v <- m v - wd lr w - lr g;  w <- w + v
//   torch (torch.optim.SGD):  g <- g + wd w;  v <- m v + (1 - dampening) g, or v <- g at the first step;
//                             w <- w - lr (g + m v if nesterov, else v); momentum 0 leaves v alone
//   params, grads: float, bfloat16 or float16 each; momentum in float or the param's type; masters in float. A step
//   with masters updates the master and rounds it to the param. The tensors of one index have the same dense strides.
// A thread updates kSgdElements elements of one tensor, in groups of kSgdGroup that follow those of the other threads,
// so that a warp's accesses are contiguous for every dtype; the blocks of each tensor follow those of the tensor before
// it. Arrays aligned to 16 bytes move as vectors; others, such as gradients inside a bucket, element by element. The
// learning rate may be in device memory, so that a captured CUDA graph follows its schedule.
#include "image_layout.cuh"

namespace alexnet_kernels::cuda {
namespace {

struct SgdTensor {
  void *param, *momentum;
  float* master;  // may be null
  const void* grad;
  int64_t count;
  int first_block;
  bool param_aligned, grad_aligned, momentum_aligned, master_aligned;  // to 16 bytes
};

struct SgdTensors {
  SgdTensor tensor[kSgdTensors];
  int count;
};

struct SgdRates {
  float lr, decay_lr;  // decay_lr = weight_decay lr
};

struct SgdRule {
  SgdRates rates;
  float momentum, weight_decay, keep;  // keep = 1 - dampening
  bool nesterov, paper, first_step;
  const float* lr_pointer;  // replaces lr unless null
};

__device__ __forceinline__ void step(const SgdRule& rule, const SgdRates& rates, float& w, float g, float& v) {
  if (rule.paper) {
    v = rule.momentum * v - rates.decay_lr * w - rates.lr * g;
    w += v;
    return;
  }
  g += rule.weight_decay * w;
  if (rule.momentum == 0.f) {
    w -= rates.lr * g;
  } else {
    v = rule.first_step ? g : rule.momentum * v + rule.keep * g;
    w -= rates.lr * (rule.nesterov ? g + rule.momentum * v : v);
  }
}

template <int kCount, class T>
__device__ __forceinline__ void load_if(bool aligned, const T* p, float (&out)[kCount]) {
  if (aligned) {
    load<kCount>(p, out);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = float(p[i]);
  }
}

template <int kCount, class T>
__device__ __forceinline__ void store_if(bool aligned, T* p, const float (&in)[kCount]) {
  if (aligned) {
    store<kCount>(p, in);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) p[i] = T(in[i]);
  }
}

// The elements [at, at + kCount) and as many at each of kGroups steps of kThreads kCount elements.
template <int kGroups, int kCount, class P, class G, class M>
__device__ __forceinline__ void step_at(const SgdRule& rule, const SgdRates& rates, const SgdTensor& t, int64_t at) {
  constexpr int kStep = kThreads * kCount;
  float w[kGroups][kCount], g[kGroups][kCount], v[kGroups][kCount];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (t.master != nullptr) {
      load_if<kCount>(t.master_aligned, t.master + at + i * kStep, w[i]);
    } else {
      load_if<kCount>(t.param_aligned, static_cast<const P*>(t.param) + at + i * kStep, w[i]);
    }
    load_if<kCount>(t.grad_aligned, static_cast<const G*>(t.grad) + at + i * kStep, g[i]);
    load_if<kCount>(t.momentum_aligned, static_cast<const M*>(t.momentum) + at + i * kStep, v[i]);
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) step(rule, rates, w[i][j], g[i][j], v[i][j]);
    store_if<kCount>(t.momentum_aligned, static_cast<M*>(t.momentum) + at + i * kStep, v[i]);
    if (t.master != nullptr) store_if<kCount>(t.master_aligned, t.master + at + i * kStep, w[i]);
    store_if<kCount>(t.param_aligned, static_cast<P*>(t.param) + at + i * kStep, w[i]);
  }
}

template <class P, class G, class M>
__global__ void __launch_bounds__(kThreads, kSgdBlocks) sgd(SgdTensors tensors, SgdRule rule) {
  int i = 0;
  while (i + 1 < tensors.count && tensors.tensor[i + 1].first_block <= int(blockIdx.x)) ++i;
  const SgdTensor& t = tensors.tensor[i];
  const int64_t first = int64_t(int(blockIdx.x) - t.first_block) * (kThreads * kSgdElements);
  SgdRates rates = rule.rates;
  if (rule.lr_pointer != nullptr) {
    rates.lr = *rule.lr_pointer;
    rates.decay_lr = rule.weight_decay * rates.lr;
  }
  constexpr int kGroups = kSgdElements / kSgdGroup;
  int64_t at = first + threadIdx.x * kSgdGroup;
  if (first + kThreads * kSgdElements <= t.count) {
    step_at<kGroups, kSgdGroup, P, G, M>(rule, rates, t, at);
    return;
  }
#pragma unroll 1
  for (; at < t.count; at += kThreads * kSgdGroup) {
    if (at + kSgdGroup <= t.count) {
      step_at<1, kSgdGroup, P, G, M>(rule, rates, t, at);
    } else {
#pragma unroll 1
      for (int64_t j = at; j < t.count; ++j) step_at<1, 1, P, G, M>(rule, rates, t, j);
    }
  }
}

// Steps the tensors of one combination of dtypes.
template <class P, class G, class M>
void step_all(const OnDevice& device, const SgdRule& rule, const std::vector<SgdTensor>& all) {
  for (size_t first = 0; first < all.size(); first += kSgdTensors) {
    SgdTensors tensors{};
    int64_t blocks = 0;
    for (size_t i = first; i < std::min(first + kSgdTensors, all.size()); ++i) {
      SgdTensor& t = tensors.tensor[tensors.count++];
      t = all[i];
      t.first_block = int(blocks);
      blocks += divide_up(t.count, kThreads * kSgdElements);
      STD_TORCH_CHECK(blocks < (int64_t(1) << 31),
                      "sgd_step: the tensors are too large for one launch of 2^31 - 1 blocks");
    }
    device.launch(sgd<P, G, M>, blocks, kThreads, tensors, rule);
  }
}

void sgd_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
              std::vector<Tensor> masters, double lr, double momentum, double weight_decay, double dampening,
              bool nesterov, bool paper_rule, bool first_step, std::optional<Tensor> lr_tensor) {
  if (params.empty()) return;
  operands("sgd_step", "params[0]", params[0]).sgd(params, grads, momentum_buffers, masters);
  const OnDevice device(params[0]);
  if (lr_tensor) {
    STD_TORCH_CHECK(dtype_of(*lr_tensor) == DType::f32 && lr_tensor->numel() == 1 &&
                        lr_tensor->get_device() == params[0].get_device(),
                    "sgd_step: lr_tensor must be one float32 on the parameters' device");
  }
  const SgdRule rule{{float(lr), float(weight_decay * lr)},
                     float(momentum),
                     float(weight_decay),
                     float(1 - dampening),
                     nesterov,
                     paper_rule,
                     first_step,
                     lr_tensor ? data<float>(*lr_tensor) : nullptr};
  std::vector<bool> done(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    if (done[i]) continue;
    std::vector<SgdTensor> alike;
    for (size_t j = i; j < params.size(); ++j) {
      const bool same = params[j].scalar_type() == params[i].scalar_type() &&
                        grads[j].scalar_type() == grads[i].scalar_type() &&
                        momentum_buffers[j].scalar_type() == momentum_buffers[i].scalar_type();
      if (!same || done[j]) continue;
      done[j] = true;
      if (params[j].numel() == 0) continue;
      SgdTensor t{params[j].mutable_data_ptr(), momentum_buffers[j].mutable_data_ptr(),
                  masters.empty() ? nullptr : mutable_data<float>(masters[j]), grads[j].const_data_ptr(),
                  params[j].numel()};
      t.param_aligned = aligned(static_cast<char*>(t.param));
      t.grad_aligned = aligned(static_cast<const char*>(t.grad));
      t.momentum_aligned = aligned(static_cast<char*>(t.momentum));
      t.master_aligned = aligned(t.master);
      alike.push_back(t);
    }
    if (alike.empty()) continue;
    for_dtype(params[i], [&](auto p) {
      using P = decltype(p);
      for_dtype(grads[i], [&](auto g) {
        using G = decltype(g);
        for_dtype(momentum_buffers[i], [&](auto m) {
          using M = decltype(m);
          // The op accepts no other momentum dtype.
          if constexpr (std::is_same_v<M, float> || std::is_same_v<M, P>) step_all<P, G, M>(device, rule, alike);
        });
      });
    });
  }
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("sgd_step", TORCH_BOX(&sgd_step));
}

}  // namespace alexnet_kernels::cuda
