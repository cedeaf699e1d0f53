// Replays calls of the emulation's operators, for a sanitizer to watch.
//   sanitize FILE             replays the calls of a file of emulation/calls.py, which documents the format; prints the
//                             calls and kernel launches of each operator
//   sanitize --trial NAME...  runs kernels of trials.h, in one block with one element a thread
//   sanitize --pipeline FAULT...
//                             runs the kernel of hopper_trials.h with faults, or "none"
//
// Each tensor has memory of its own that ends with its last element: AddressSanitizer reports an access one byte
// beyond.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>

#include "common/tensor.h"
#include "emulation/hopper_trials.h"
#include "emulation/trials.h"
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

using alexnet_kernels::IntList;
using alexnet_kernels::ScalarType;
using alexnet_kernels::Tensor;
using Optional = std::optional<Tensor>;

// A tensor in memory of `skipped` + `bytes` bytes; `data` are the values, gaps between strides included.
Tensor tensor(ScalarType type, const IntList& sizes, const IntList& strides, int64_t skipped, int64_t bytes,
              const char* data) {
  char* memory = static_cast<char*>(std::malloc(skipped + bytes));
  std::memcpy(memory + skipped, data, bytes);
  return torch::stable::from_blob(memory + skipped, sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
                                  [memory](void*) { std::free(memory); });
}

// The file's contents, read from front to back.
class Reader {
 public:
  explicit Reader(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + " cannot be opened");
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
  }

  const char* take(size_t count) {
    if (count > bytes_.size() - at_) throw std::runtime_error("the file of calls is too short");
    at_ += count;
    return bytes_.data() + at_ - count;
  }
  template <class T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }
  std::string text() {
    const auto length = number<uint32_t>();
    return std::string(take(length), length);
  }
  template <class Element>
  auto list(size_t length, const Element& element) {
    std::vector<decltype(element())> all;
    for (size_t i = 0; i < length; ++i) all.push_back(element());
    return all;
  }
  IntList ints(size_t length) {
    return list(length, [&] { return number<int64_t>(); });
  }
  ScalarType type() { return ScalarType(number<uint8_t>()); }
  Tensor tensor() {
    const ScalarType dtype = type();
    const auto dimensions = number<uint8_t>();
    const IntList sizes = ints(dimensions), strides = ints(dimensions);
    const auto skipped = number<int64_t>(), bytes = number<int64_t>();
    return ::tensor(dtype, sizes, strides, skipped, bytes, take(bytes));
  }

  // One argument, as the dispatcher takes it.
  StableIValue argument() {
    using torch::stable::detail::from;
    switch (const char kind = number<char>()) {
      case 'T': return from(tensor());
      case 'O': return from(number<uint8_t>() ? Optional(tensor()) : Optional());
      case 'L': return from(list(number<uint32_t>(), [&] { return tensor(); }));
      case 'i': return from(number<int64_t>());
      case 'I': return from(ints(number<uint32_t>()));
      case 'f': return from(number<double>());
      case 'b': return from(bool(number<uint8_t>()));
      case 'd': return from(type());
      default: throw std::runtime_error(std::string("no type of argument has the letter ") + kind);
    }
  }

 private:
  std::vector<char> bytes_;
  size_t at_ = 0;
};

// The call being replayed, for error messages.
std::string current;
void print_current() {
  if (!current.empty()) std::fprintf(stderr, "replaying %s\n", current.c_str());
}

void replay(const std::string& path) {
  struct Count {
    int64_t calls = 0, launches = 0;
  };
  std::map<std::string, Count> counts;
  Reader reader(path);
  if (std::memcmp(reader.take(8), "ALEXCALL", 8) != 0 || reader.number<uint32_t>() != 1) {
    throw std::runtime_error(path + " is not a file of calls of version 1");
  }
  const auto calls = reader.number<uint32_t>();
  for (uint32_t i = 0; i < calls; ++i) {
    const std::string op = reader.text();
    current = "call " + std::to_string(i) + " of the file, " + op;
    const auto results = reader.number<uint32_t>(), arguments = reader.number<uint32_t>();
    std::vector<StableIValue> stack = reader.list(arguments, [&] { return reader.argument(); });
    stack.resize(std::max(results, arguments));
    const int64_t before = emulation::settings().launches;
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(("alexnet_kernels_emulated::" + op).c_str(), "", stack.data(), TORCH_ABI_VERSION));
    Count& count = counts[op];
    ++count.calls;
    count.launches += emulation::settings().launches - before;
    for (uint32_t j = 0; j < results; ++j) torch::stable::detail::to<Tensor>(stack[j]);  // frees it
  }
  current.clear();
  for (const auto& [op, count] : counts) {
    std::printf("%s: %lld calls, %lld launches\n", op.c_str(), (long long)count.calls, (long long)count.launches);
  }
}

// The output is in memory that torch allocates, as the outputs of operators are.
void run_trial(const std::string& name) {
  const int64_t threads = trials::kStatic;
  std::vector<float> values(threads);
  for (int64_t i = 0; i < threads; ++i) values[i] = float(i);
  const Tensor in = tensor(ScalarType::Float, {threads}, {1}, 0, threads * int64_t(sizeof(float)),
                           reinterpret_cast<const char*>(values.data()));
  const Tensor out = alexnet_kernels::empty({threads}, ScalarType::Float, in);
  trials::run(
      name, {static_cast<const float*>(in.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()), int(threads)},
      1, unsigned(threads), size_t(threads) * sizeof(float));
}

}  // namespace

int main(int count, char** words) {
  const std::vector<std::string> arguments(words + 1, words + count);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  __sanitizer_set_death_callback(print_current);
#endif
  try {
    if (arguments.size() > 1 && arguments[0] == "--trial") {
      for (size_t i = 1; i < arguments.size(); ++i) run_trial(arguments[i]);
    } else if (arguments.size() > 1 && arguments[0] == "--pipeline") {
      for (size_t i = 1; i < arguments.size(); ++i) trials::run_pipeline(arguments[i]);
    } else if (arguments.size() == 1) {
      replay(arguments[0]);
    } else {
      throw std::invalid_argument("usage: sanitize FILE, sanitize --trial NAME..., or sanitize --pipeline FAULT...");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    print_current();
    return 2;
  }
  return 0;
}
