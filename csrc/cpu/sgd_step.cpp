// One step of stochastic gradient descent with momentum over a list of tensors, in place and in one pass.
//   paper (Krizhevsky et al. 2012, section 5):  v <- m v - wd lr w - lr g;  w <- w + v
//   torch (torch.optim.SGD):  g <- g + wd w;  v <- m v + (1 - dampening) g, or v <- g at the first step;
//                             w <- w - lr (g + m v if nesterov, else v); momentum 0 leaves v alone
//   params, grads: any dtype each; momentum in the param's type or in float; master in float. With double params, all
//   are double. A step with masters updates the master and rounds it to the param. The param, gradient, momentum and
//   master of one index have the same shape and dense strides.
// A task is kSgdTaskElements elements of one tensor.
#include <vector>

#include "tasks.h"
#include "vec.h"

namespace alexnet_kernels::cpu {

struct SgdTensor {
  DType param_type, grad_type, momentum_type;
  void *param, *momentum, *master;  // master may be null
  const void* grad;
  int64_t count, first_task;
};

struct SgdArgs {
  std::vector<SgdTensor> tensors;
  double lr, momentum, weight_decay, dampening;
  bool nesterov, paper, first_step;
};

namespace ALEXNET_ISA {
namespace {

template <class P, class G, class M>
void step(const SgdArgs& a, const SgdTensor& t, int64_t first, int64_t count) {
  using A = acc_t<P>;
  P* param = static_cast<P*>(t.param) + first;
  A* master = t.master ? static_cast<A*>(t.master) + first : nullptr;
  M* momentum = static_cast<M*>(t.momentum) + first;
  const G* grad = static_cast<const G*>(t.grad) + first;
  const A lr = A(a.lr), m = A(a.momentum), keep = A(1 - a.dampening);
  const A wd = A(a.weight_decay), decay_lr = A(a.weight_decay * a.lr);
  for_lanes<A>(count, [&](int64_t i, auto lanes) {
    Vec<A> w = master ? load_n(master + i, lanes) : load_n(param + i, lanes);
    Vec<A> g = load_n(grad + i, lanes), v = load_n(momentum + i, lanes);
    if (a.paper) {
      v = m * v - decay_lr * w - lr * g;
      w += v;
    } else {
      g += wd * w;
      if (a.momentum == 0) {
        w -= lr * g;
      } else {
        v = a.first_step ? g : m * v + keep * g;
        w -= lr * (a.nesterov ? g + m * v : v);
      }
    }
    store_n(momentum + i, v, lanes);
    if (master) store_n(master + i, w, lanes);
    store_n(param + i, w, lanes);
  });
}

}  // namespace

void sgd_step(const SgdArgs& a, int64_t begin, int64_t end) {
  size_t at = 0;
  for (int64_t task = begin; task < end; ++task) {
    while (at + 1 < a.tensors.size() && a.tensors[at + 1].first_task <= task) ++at;
    const SgdTensor& t = a.tensors[at];
    const int64_t first = (task - t.first_task) * kSgdTaskElements, count = std::min(kSgdTaskElements, t.count - first);
    for_dtype(t.param_type, [&](auto p) {
      for_dtype(t.grad_type, [&](auto g) {
        for_dtype(t.momentum_type, [&](auto m) {
          using P = decltype(p);
          using G = decltype(g);
          using M = decltype(m);
          // The op accepts these types only: double with double, momentum in float or the param's type.
          constexpr bool same_computing_type = std::is_same_v<acc_t<P>, acc_t<G>> && std::is_same_v<acc_t<P>, acc_t<M>>;
          if constexpr (same_computing_type && (std::is_same_v<M, acc_t<P>> || std::is_same_v<M, P>)) {
            step<P, G, M>(a, t, first, count);
          }
        });
      });
    });
  }
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu

#ifdef ALEXNET_REGISTER
#include "operator.h"

namespace alexnet_kernels::cpu {
ALEXNET_DECLARE_KERNEL(sgd_step, SgdArgs)

namespace {

void sgd_step_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
                  std::vector<Tensor> masters, double lr, double momentum, double weight_decay, double dampening,
                  bool nesterov, bool paper_rule, bool first_step, std::optional<Tensor> lr_tensor) {
  STD_TORCH_CHECK(!lr_tensor, "sgd_step: lr_tensor is for GPU parameters only; pass lr for CPU parameters");
  if (params.empty()) return;
  operands("sgd_step", "params[0]", params[0]).sgd(params, grads, momentum_buffers, masters);
  SgdArgs args{{}, lr, momentum, weight_decay, dampening, nesterov, paper_rule, first_step};
  int64_t tasks = 0, bytes = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t count = params[i].numel();
    if (count == 0) continue;
    args.tensors.push_back({dtype_of(params[i]), dtype_of(grads[i]), dtype_of(momentum_buffers[i]),
                            params[i].mutable_data_ptr(), momentum_buffers[i].mutable_data_ptr(),
                            masters.empty() ? nullptr : masters[i].mutable_data_ptr(), grads[i].const_data_ptr(), count,
                            tasks});
    tasks += (count + kSgdTaskElements - 1) / kSgdTaskElements;
    bytes += count * 20;
  }
  run(pick_sgd_step(), args, tasks, bytes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("sgd_step", TORCH_BOX(&sgd_step_cpu));
}

}  // namespace alexnet_kernels::cpu
#endif
