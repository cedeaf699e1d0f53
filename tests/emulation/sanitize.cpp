// Every operator of the emulation, forward and backward, on small odd shapes: for a sanitizer to watch.
//   sanitize [--few] [OPERATOR...]    runs them (all), --few on fewer shapes; prints the calls and launches of each
//   sanitize --trial NAME...          runs kernels of trials.h, in one block whose threads have an element each
#include <algorithm>
#include <cstdio>
#include <map>
#include <string>

#include "common/tensor.h"
#include "emulation/trials.h"

namespace {

using namespace alexnet_kernels;
using Optional = std::optional<Tensor>;
const Optional none;

constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
constexpr MemoryFormat kFormats[] = {MemoryFormat::Contiguous, MemoryFormat::ChannelsLast};

void fill(void* memory, ScalarType type, int64_t count) {
  static uint32_t state = 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    const float value = float(int(state >> 16 & 0xff) - 128) / 64.f;
    switch (type) {
      case ScalarType::Float: static_cast<float*>(memory)[i] = value; break;
      case ScalarType::BFloat16: static_cast<c10::BFloat16*>(memory)[i] = value; break;
      case ScalarType::Half: static_cast<c10::Half*>(memory)[i] = value; break;
      case ScalarType::Byte: static_cast<uint8_t*>(memory)[i] = uint8_t(state >> 16); break;
      case ScalarType::Bool: static_cast<bool*>(memory)[i] = value > 0; break;
      default: static_cast<int64_t*>(memory)[i] = int64_t(state) << 20; break;
    }
  }
}

// A tensor in memory of its own that ends where it ends, and that begins `skipped` elements before it: with one, it
// isn't aligned to vectors.
Tensor tensor(const IntList& size, ScalarType type, MemoryFormat format = MemoryFormat::Contiguous,
              int64_t skipped = 0) {
  int64_t count = 1;
  IntList strides(size.size());
  const auto dimension = [&](int d) { strides[d] = count, count *= size[d]; };
  if (format == MemoryFormat::ChannelsLast) {
    for (int d : {1, 3, 2, 0}) dimension(d);
  } else {
    for (int d = int(size.size()); d-- > 0;) dimension(d);
  }
  const int64_t bytes = empty({1}, type, torch::stable::empty({1})).element_size();
  char* memory = static_cast<char*>(std::malloc((count + skipped) * bytes));
  fill(memory + skipped * bytes, type, count);
  return torch::stable::from_blob(memory + skipped * bytes, size, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
                                  [memory](void*) { std::free(memory); });
}

struct Count {
  int64_t calls = 0, launches = 0;
};
std::map<std::string, Count> counts;

// An argument of any type that the operators take.
struct Value {
  StableIValue bits;
  template <class T>
  Value(const T& value) : bits(torch::stable::detail::from(value)) {}
};

// Calls an operator; its results.
std::vector<Tensor> call(const std::string& op, size_t results, std::initializer_list<Value> arguments) {
  std::vector<StableIValue> stack;
  for (const Value& argument : arguments) stack.push_back(argument.bits);
  const int64_t before = emulation::settings().launches;
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(("alexnet_kernels_emulated::" + op).c_str(), "", stack.data(), TORCH_ABI_VERSION));
  Count& count = counts[op];
  ++count.calls;
  count.launches += emulation::settings().launches - before;
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < results; ++i) tensors.push_back(torch::stable::detail::to<Tensor>(stack[i]));
  return tensors;
}
Tensor call(const std::string& op, std::initializer_list<Value> arguments) {
  return call(op, 1, arguments)[0];
}

struct Settings {
  ScalarType type;
  MemoryFormat format;
  bool few;

  Tensor images(const IntList& size, int64_t skipped = 0) const { return tensor(size, type, format, skipped); }
  Tensor rows(const IntList& size, int64_t skipped = 0) const {
    return tensor(size, type, MemoryFormat::Contiguous, skipped);
  }
};
Tensor floats(const IntList& size) {
  return tensor(size, ScalarType::Float);
}

struct Images {
  IntList size;
  int64_t skipped;
};
// Vectors that the channels divide into, in more than one block; channels that don't; one pixel an image; unaligned.
std::vector<Images> images(const Settings& s) {
  std::vector<Images> all = {{{2, 24, 11, 9}, 0}, {{3, 5, 7, 9}, 0}};
  if (s.few) return all;
  all.insert(all.end(), {{{3, 1, 1, 1}, 0}, {{1, 8, 13, 6}, 0}, {{2, 24, 11, 9}, 1}, {{3, 5, 7, 9}, 1}});
  return all;
}

struct Window {
  IntList kernel, stride, padding;
  bool ceil_mode;
};
// Those that fit images of this size.
std::vector<Window> windows(const Settings& s, const IntList& size) {
  std::vector<Window> fitting;
  for (const Window& w : {Window{{3, 3}, {2, 2}, {0, 0}, true}, Window{{3, 3}, {2, 2}, {1, 1}, false},
                          Window{{2, 5}, {3, 1}, {1, 2}, true}, Window{{1, 1}, {2, 3}, {0, 0}, false}}) {
    const bool fits = size[2] + 2 * w.padding[0] >= w.kernel[0] && size[3] + 2 * w.padding[1] >= w.kernel[1];
    if (fits && (!s.few || fitting.empty())) fitting.push_back(w);
  }
  return fitting;
}

struct Norm {
  int64_t size;
  double beta;
  int64_t groups;
};
std::vector<Norm> norms(const IntList& size) {
  const int64_t groups = size[1] % 3 == 0 ? 3 : size[1];
  return {{5, 0.75, 1}, {5, 0.75, groups}, {4, 0.6, groups}, {3, 0.75, 1}};
}
constexpr double kAlpha = 0.5, kK = 2;

void max_pool2d(const Settings& s) {
  for (const auto& [size, skipped] : images(s)) {
    for (const Window& w : windows(s, size)) {
      for (bool relu : {false, true}) {
        const auto results =
            call("max_pool2d", 2, {s.images(size, skipped), w.kernel, w.stride, w.padding, w.ceil_mode, relu});
        const Tensor grad = s.images(sizes_of(results[0]), skipped);
        call("max_pool2d_backward",
             {grad, relu ? Optional(results[0]) : none, results[1], size, w.kernel, w.stride, w.padding, relu});
      }
    }
  }
}

void local_response_norm(const Settings& s) {
  for (const auto& [size, skipped] : images(s)) {
    for (const Norm& n : norms(size)) {
      const Tensor x = s.images(size, skipped), grad = s.images(size, skipped);
      call("local_response_norm", {x, n.size, kAlpha, n.beta, kK, n.groups});
      call("local_response_norm_backward", {grad, x, n.size, kAlpha, n.beta, kK, n.groups});
    }
  }
}

void lrn_max_pool2d(const Settings& s) {
  for (const auto& [size, skipped] : images(s)) {
    for (const Window& w : windows(s, size)) {
      for (const Norm& n : norms(size)) {
        const bool relu = n.groups == 1;
        const Tensor x = s.images(size, skipped);
        const auto results =
            call("lrn_max_pool2d", 2,
                 {x, n.size, kAlpha, n.beta, kK, n.groups, w.kernel, w.stride, w.padding, w.ceil_mode, relu});
        const Tensor grad = s.images(sizes_of(results[0]), skipped);
        call("lrn_max_pool2d_backward",
             {grad, x, results[1], n.size, kAlpha, n.beta, kK, n.groups, w.kernel, w.stride, w.padding, relu});
      }
    }
  }
}

void within_map_response_norm(const Settings& s) {
  for (const auto& [size, skipped] : images(s)) {
    for (const Norm& n : norms(size)) {
      const Tensor x = s.images(size, skipped), grad = s.images(size, skipped);
      call("within_map_response_norm", {x, n.size, kAlpha, n.beta, kK});
      call("within_map_response_norm_backward", {grad, x, n.size, kAlpha, n.beta, kK});
    }
  }
}

void batch_norm_relu(const Settings& s) {
  for (const auto& [size, skipped] : images(s)) {
    const IntList channels{size[1]};
    const Tensor mean = floats(channels), var = s.rows(channels, skipped);
    torch::stable::fill_(var, 0.5);
    for (bool training : {true, false}) {
      for (bool affine : {true, false}) {
        const Optional weight = affine ? Optional(s.rows(channels, skipped)) : none;
        const Optional bias = affine ? Optional(floats(channels)) : none;
        const Tensor x = s.images(size, skipped), grad = s.images(size, skipped);
        const auto results =
            call("batch_norm_relu", 3,
                 {x, training ? none : Optional(mean), training ? none : Optional(var), weight, bias, training, 1e-5});
        call("batch_norm_relu_backward", 3, {grad, x, results[1], results[2], weight, bias, training, 1e-5});
      }
    }
  }
}

Tensor seed() {
  return tensor({1}, ScalarType::Long);
}
constexpr int64_t kOffset = int64_t(1) << 40;
constexpr double kScale = 2;

void dropout(const Settings& s) {
  for (const auto& [size, skipped] : images(s)) {
    const int64_t pixels = size[2] * size[3], image = size[1] * pixels, count = size[0] * image;
    const Tensor x = s.images(size, skipped), row = s.rows({2049}, skipped);
    for (double p : {0.5, 1.0, 0.0}) {
      call("dropout", {x, p, kScale, seed(), kOffset, count, count, 0});
      call("dropout", {x, p, kScale, seed(), kOffset, image, image + 3 * pixels, 1});  // some channels of more
      call("dropout", {row, p, kScale, seed(), kOffset, 2049, 2049, 0});
      call("dropout", {row, p, kScale, seed(), kOffset, 683, 700, 3});
    }
  }
}

void linear_relu_dropout(const Settings& s) {
  for (int64_t out : {5, 16, 701}) {
    for (int64_t skipped : {0, 1}) {
      const Tensor x = s.rows({3, 7}, skipped), weight = s.rows({out, 7}, skipped), grad = s.rows({3, out}, skipped);
      for (bool relu : {false, true}) {
        const Optional bias = relu ? Optional(s.rows({out}, skipped)) : none;
        const Tensor output = call("linear_relu_dropout", {x, weight, bias, relu, 0.5, kScale, seed(), kOffset, out,
                                                           out + 3 * skipped, skipped});
        call("relu_dropout_backward", {grad, output, kScale});
      }
    }
  }
  for (const auto& [size, skipped] : images(s)) {
    call("relu_dropout_backward", {s.images(size), s.images(size, skipped), kScale});
  }
}

void conv2d_relu(const Settings& s) {
  struct Convolution {
    IntList size, weight, stride, padding;
    int64_t groups;
  };
  for (const Convolution& c : {Convolution{{3, 5, 9, 7}, {6, 5, 3, 3}, {1, 1}, {1, 1}, 1},
                               Convolution{{2, 4, 11, 13}, {24, 2, 3, 2}, {2, 1}, {0, 1}, 2},
                               Convolution{{3, 3, 1, 1}, {7, 3, 1, 1}, {1, 1}, {0, 0}, 1}}) {
    const Tensor x = s.images(c.size), weight = s.images(c.weight);
    const Optional bias = s.rows({c.weight[0]}, 1);
    for (bool relu : {false, true}) {
      call("conv2d_relu", {x, weight, bias, c.stride, c.padding, c.groups, relu});
      call("conv2d_relu", {x, weight, none, c.stride, c.padding, c.groups, relu});
    }
  }
}

void space_to_depth(const Settings& s) {
  for (const IntList& size : {IntList{3, 3, 13, 10}, IntList{1, 2, 1, 1}, IntList{2, 1, 20, 23}}) {
    for (int64_t block : {2, 4}) {
      for (int64_t pad : {0, 1}) {
        for (ScalarType type : kTypes) {
          // More rows of blocks than the image fills, fewer columns.
          const IntList padding{pad, 2 * pad}, blocks{size[2] / block + 2, std::max<int64_t>(1, size[3] / block)};
          const Tensor x = s.images(size);
          const Tensor output = call("space_to_depth", {x, block, padding, blocks, type});
          const Tensor grad = s.images(sizes_of(output));
          call("depth_to_space", {grad, block, padding, IntList{size[2], size[3]}, type});
        }
      }
    }
    if (s.few) return;
  }
}

void sgd_step(const Settings& s) {
  // 0: all arrays aligned; 1: not the parameters; 2: not the gradients.
  for (int unaligned : {0, 1, 2}) {
    if (s.few && unaligned) return;
    for (bool with_masters : {false, true}) {
      std::vector<Tensor> params, grads, momentum, masters;
      const auto add = [&](const IntList& size, ScalarType param, ScalarType grad, ScalarType buffer) {
        const MemoryFormat format = size.size() == 4 ? s.format : MemoryFormat::Contiguous;
        params.push_back(tensor(size, param, format, unaligned == 1));
        grads.push_back(tensor(size, grad, format, unaligned == 2));
        momentum.push_back(tensor(size, buffer, format));
        if (with_masters) masters.push_back(tensor(size, ScalarType::Float, format));
      };
      for (const IntList& size : {IntList{1}, IntList{7}, IntList{4099}, IntList{6, 5, 3, 3}, IntList{0}}) {
        for (ScalarType grad : kTypes) {
          add(size, s.type, grad, s.type);
          add(size, s.type, grad, ScalarType::Float);
        }
      }
      // More than one launch takes.
      for (int i = 0; i < 70; ++i) add({9}, ScalarType::Float, s.type, ScalarType::Float);
      call("sgd_step", 0, {params, grads, momentum, masters, 0.01, 0.9, 5e-4, 0.0, false, true, false, Optional()});
      call("sgd_step", 0, {params, grads, momentum, masters, 0.01, 0.9, 5e-4, 0.0, true, false, true, Optional()});
      call("sgd_step", 0, {params, grads, momentum, masters, 0.01, 0.0, 5e-4, 0.5, false, false, false, Optional()});
      call("sgd_step", 0,
           {params, grads, momentum, masters, 0.0, 0.9, 5e-4, 0.0, false, true, false,
            Optional(tensor({}, ScalarType::Float))});
    }
  }
}

void augment(const Settings& s) {
  const int64_t height = 11, width = 14;
  const bool channels_last = s.format == MemoryFormat::ChannelsLast;
  for (const IntList& size : {IntList{7, 9}, IntList{height, width}, IntList{1, 1}, IntList{8, 8}}) {
    const Tensor pictures = tensor({3, height, width, 3}, ScalarType::Byte), crops = tensor({3, 2}, ScalarType::Long);
    for (int i = 0; i < 6; ++i) {  // at the first corner, in the middle, at the last corner
      const int64_t most = i % 2 ? width - size[1] : height - size[0];
      static_cast<int64_t*>(crops.mutable_data_ptr())[i] = most * (i / 2) / 2;
    }
    call("augment", {pictures, crops, size, none, none, none, none, s.type, channels_last});
    const Optional flips = tensor({3}, ScalarType::Bool), shift = floats({3, 3}), scale = floats({3});
    for (const IntList& shape : {IntList{3}, IntList{3, size[0], size[1]}, IntList{3, height, width}}) {
      const Optional mean = floats(shape);
      call("augment", {pictures, crops, size, flips, shift, mean, scale, s.type, channels_last});
    }
  }
}

const std::map<std::string, void (*)(const Settings&)> kOperators = {
    {"augment", augment},
    {"batch_norm_relu", batch_norm_relu},
    {"conv2d_relu", conv2d_relu},
    {"dropout", dropout},
    {"linear_relu_dropout", linear_relu_dropout},
    {"local_response_norm", local_response_norm},
    {"lrn_max_pool2d", lrn_max_pool2d},
    {"max_pool2d", max_pool2d},
    {"sgd_step", sgd_step},
    {"space_to_depth", space_to_depth},
    {"within_map_response_norm", within_map_response_norm},
};

// The output lies in memory that torch allocated, as those of operators do.
void run_trial(const std::string& name) {
  const int64_t threads = trials::kStatic;
  const Tensor in = tensor({threads}, ScalarType::Float), out = empty({threads}, ScalarType::Float, in);
  trials::run(
      name, {static_cast<const float*>(in.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()), int(threads)},
      1, unsigned(threads), size_t(threads) * sizeof(float));
}

void run_operators(std::vector<std::string> names, bool few) {
  if (names.empty()) {
    for (const auto& [name, function] : kOperators) names.push_back(name);
  }
  for (const std::string& name : names) {
    for (ScalarType type : kTypes) {
      for (MemoryFormat format : kFormats) kOperators.at(name)({type, format, few});
    }
  }
  for (const auto& [op, count] : counts) {
    std::printf("%s: %lld calls, %lld launches\n", op.c_str(), (long long)count.calls, (long long)count.launches);
  }
}

}  // namespace

int main(int count, char** words) {
  std::vector<std::string> arguments(words + 1, words + count);
  try {
    if (!arguments.empty() && arguments[0] == "--trial") {
      for (size_t i = 1; i < arguments.size(); ++i) run_trial(arguments[i]);
      return 0;
    }
    const auto flag = std::find(arguments.begin(), arguments.end(), "--few");
    const bool few = flag != arguments.end();
    if (few) arguments.erase(flag);
    run_operators(arguments, few);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  return 0;
}
