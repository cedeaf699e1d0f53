// CUDA C++ on the CPU, for tests: the host's compiler compiles a .cu file, whose kernels run in this emulation.
//
// Each CUDA thread is a fiber with its own stack. It yields where the thread waits: at __syncthreads() and at the
// collectives of a warp (shuffles, votes, __syncwarp). A fiber that never waits is reused for the next thread. Blocks
// run one after the other. Where hardware would hang or compute wrong values (a barrier or collective that some threads
// do not reach, lanes of a warp in different collectives), the launch ends with a std::runtime_error that tells where
// each thread is. Dynamic shared memory is initialised to NaN. Units of hardware that work beside the threads complete
// their operations late, in a random order (hopper.h).
//
// With -fsanitize=address, accesses outside tensors and dynamic shared memory are reported; with -fsanitize=thread,
// data races between the threads of a block, for which every CUDA thread has a fiber of its own.
#pragma once

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __constant__ static const
#define __restrict__ __restrict
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  size_t count() const { return size_t(x) * y * z; }
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
typedef struct CUstream_st* cudaStream_t;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    default: return "invalid configuration argument";
  }
}

namespace emulation {

constexpr size_t kStack = 256 * 1024, kGuard = 4096;
constexpr size_t kMostShared = 227 * 1024;  // the limit of dynamic shared memory of a block on sm_90 and sm_100
constexpr unsigned kMostThreads = 1024, kMostBlocksYZ = 65535, kMostBlocksX = 2147483647;
constexpr unsigned kWarp = 32;

enum class State { unstarted, running, at_barrier, at_collective, at_phase, finished };

struct Fiber {
  char* stack = nullptr;  // null for the fiber that launches
  void* stack_pointer = nullptr;
  void* sanitizer = nullptr;  // the sanitizer's handle of the fiber
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

struct Thread {
  dim3 index;
  unsigned number;
  State state;
  Fiber* fiber;
  // The collective that the thread waits in: its kind, its mask, the operand, and the address of the result.
  const void* collective;
  unsigned mask;
  const void* in;
  void* out;
};

// Hardware beside the threads of a block, whose state lasts as long as the block.
struct Unit {
  virtual ~Unit() = default;
  // A thread is about to meet others, at a barrier or in a collective.
  virtual void meet() {}
  // The threads have finished: what they left undone, or an empty string.
  virtual std::string finish() = 0;
  // No thread can go on: what the unit waits for, or an empty string.
  virtual std::string waits_for() const { return {}; }
};

// A launch that did not run. `kernel` is the offset of its function in the module; `arguments` are the bytes of its
// parameters, as constant memory holds them.
struct Launch {
  size_t kernel;
  dim3 grid, block;
  size_t shared;
  std::string arguments;
};

// The order of the next launches, and the size of the last one.
struct Settings {
  unsigned order = 0;  // 0: threads and blocks start in index order; otherwise the seed of a permutation
  int64_t launches = 0;
  size_t blocks = 0, threads = 0, shared = 0;
  int64_t conflicts = 0;  // rows of ldmatrix that wait for banks of another row
  bool record = false;    // launches do not run, but are added to `recorded`
  std::vector<Launch> recorded;
  int capability = 90, multiprocessors = 132;  // of the device, as an H100's
};
inline Settings& settings() {
  static Settings s;
  return s;
}

// The block that this CPU thread is running.
class Block {
 public:
  static Block& current() {
    static thread_local Block block;
    return block;
  }
  ~Block() {
    for (Fiber* fiber : fibers_) discard(fiber);
    std::free(shared_);
  }

  dim3 index, size, grid;
  Thread* thread = nullptr;

  char* shared() const { return shared_; }
  size_t shared_bytes() const { return shared_bytes_; }
  // Whether these bytes are in dynamic shared memory.
  bool holds(const void* p, size_t bytes) const {
    const size_t at = size_t(static_cast<const char*>(p) - shared_);
    return at <= shared_bytes_ && bytes <= shared_bytes_ - at;
  }

  void run(const std::function<void()>& kernel, size_t shared_bytes, unsigned order) {
    kernel_ = &kernel;
    prepare_shared(shared_bytes);
    threads_.assign(size.count(), Thread{});
    order_.resize(threads_.size());
    for (unsigned i = 0; i < threads_.size(); ++i) {
      Thread& t = threads_[i];
      t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
      t.number = order_[i] = i;
    }
    seed_ = order;
    for (unsigned i = unsigned(order_.size()); order && i > 1; --i) std::swap(order_[i - 1], order_[random() % i]);
    adversity_ = order;
    seed_ = order + 7919 * unsigned(index.x + size_t(grid.x) * (index.y + size_t(grid.y) * index.z));
    late_ = order == 0 ? 0 : random() % 3;
    started_ = finished_ = waiting_ = 0;
    total_ = 0;
    ready_.clear();
    next_ = 0;
    error_.clear();
#if defined(__SANITIZE_THREAD__)
    while (idle_.size() < threads_.size()) idle_.push_back(make());
#endif
    release(&start_);
    ignore(true);
    while (error_.empty() && (started_ < threads_.size() || next_ < ready_.size())) yield();
    acquire(&end_);
    idle_.insert(idle_.end(), spent_.begin(), spent_.end());
    spent_.clear();
    if (error_.empty() && finished_ != threads_.size()) {
      error_ = "a barrier or a warp collective that not every thread reaches";
      for (const auto& [tag, unit] : units_) error_ += unit->waits_for();
    }
    if (error_.empty() && !under_way_.empty()) error_ = "the block ends with copies under way";
    for (const auto& [tag, unit] : units_) {
      if (error_.empty()) error_ = unit->finish();
    }
    units_.clear();
    under_way_.clear();
    ignore(false);
    if (!error_.empty()) {
      // Fibers of threads that wait cannot be reused.
      idle_.clear();
      for (Fiber* fiber : fibers_) discard(fiber);
      fibers_.clear();
      throw std::runtime_error("CUDA emulation: " + error_ + where());
    }
  }

  // The block's unit of type U.
  template <class U>
  U& unit() {
    static char tag;
    for (const auto& [its_tag, unit] : units_) {
      if (its_tag == &tag) return static_cast<U&>(*unit);
    }
    units_.emplace_back(&tag, std::make_unique<U>());
    return static_cast<U&>(*units_.back().second);
  }

  // Starts an operation of a unit. It completes at a later switch of fibers, before or after others.
  void start(std::function<void()> complete) { under_way_.push_back(std::move(complete)); }

  // Lets other threads go first, or not. The switches of the emulation's default order are those that hurt most.
  void preempt(bool likely) {
    if (adversity_ == 0 ? !likely : random() % 2 == 0) return;
    wake(*thread);
    thread->fiber = running_;
    yield();
  }
  // Suspends the thread until `wake`.
  void wait(State why) {
    thread->state = why;
    thread->fiber = running_;
    yield();
  }
  void wake(Thread& t) {
    t.state = State::running;
    ready_.push_back(&t);
  }
  // Ends the launch with an error. A thread that fails does not go on.
  void report(const std::string& what) {
    if (error_.empty()) error_ = what;
  }
  void fail(const std::string& what) {
    report(what);
    wait(thread->state);
  }

  unsigned threads() const { return unsigned(threads_.size()); }
  unsigned generation() const { return generation_; }  // how many __syncthreads() the block has passed

  // Tells ThreadSanitizer the happens-before edges of barriers and collectives, and to ignore the emulation's memory.
  static void release([[maybe_unused]] void* edge) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(edge);
#endif
  }
  static void acquire([[maybe_unused]] void* edge) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(edge);
#endif
  }
  static void ignore([[maybe_unused]] bool on) {
#if defined(__SANITIZE_THREAD__)
    on ? AnnotateIgnoreReadsBegin(__FILE__, __LINE__) : AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    on ? AnnotateIgnoreWritesBegin(__FILE__, __LINE__) : AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
  }

  // Waits for all threads of the block; returns the sum of their values.
  int barrier(int value) {
    ignore(true);
    for (const auto& [tag, unit] : units_) unit->meet();
    char* edge = &barriers_[generation_ % 2];
    release(edge);
    total_ += value;
    if (++waiting_ == threads_.size()) {
      result_ = total_;
      total_ = 0;
      waiting_ = 0;
      ++generation_;
      for (unsigned i : order_) {
        if (&threads_[i] != thread) wake(threads_[i]);
      }
    } else {
      wait(State::at_barrier);
    }
    acquire(edge);
    const int result = result_;
    ignore(false);
    return result;
  }

  // A collective of the lanes in `mask`. The last lane to arrive computes combine(lane, operands) for all of them.
  template <class Out, class In, class Combine>
  Out collective(unsigned mask, const void* which, const In& in, const Combine& combine) {
    ignore(true);
    for (const auto& [tag, unit] : units_) unit->meet();
    const unsigned lane = thread->number % kWarp, first = thread->number - lane;
    const unsigned lanes = std::min<unsigned>(kWarp, unsigned(threads_.size()) - first);
    if (lanes < kWarp) mask &= (1u << lanes) - 1;
    Out out{};
    if (!(mask >> lane & 1)) fail("a lane calls a collective whose mask leaves it out");
    thread->collective = which, thread->mask = mask, thread->in = &in, thread->out = &out;
    thread->state = State::at_collective;
    release(&thread->in);
    unsigned here = 0;
    for (unsigned l = 0; l < lanes; ++l) {
      const Thread& t = threads_[first + l];
      if (t.state != State::at_collective || !(mask >> l & 1)) continue;
      if (t.collective != which || t.mask != mask) fail("lanes of a warp meet in different collectives");
      here |= 1u << l;
    }
    if (here == mask) {
      const In* operands[kWarp] = {};
      for (unsigned l = 0; l < lanes; ++l) {
        if (!(mask >> l & 1)) continue;
        acquire(&threads_[first + l].in);
        operands[l] = static_cast<const In*>(threads_[first + l].in);
      }
      for (unsigned l = 0; l < lanes; ++l) {
        if (!(mask >> l & 1)) continue;
        *static_cast<Out*>(threads_[first + l].out) = combine(l, operands);
        release(&threads_[first + l].out);
      }
      thread->state = State::running;
      for (unsigned l = 0; l < lanes; ++l) {
        if ((mask >> l & 1) && l != lane) wake(threads_[first + l]);
      }
    } else {
      wait(State::at_collective);
    }
    acquire(&thread->out);
    ignore(false);
    return out;
  }

 private:
  static void entry() {
#if defined(__SANITIZE_ADDRESS__)
    Block& b = current();
    __sanitizer_finish_switch_fiber(nullptr, b.main_bottom_ ? nullptr : &b.main_bottom_,
                                    b.main_bottom_ ? nullptr : &b.main_bytes_);
#endif
    current().work();
  }

  // The body of a fiber: runs one thread after the other until one waits.
  [[noreturn]] void work() {
    ignore(true);
    for (;;) {
      while (started_ < threads_.size()) {
        thread = &threads_[order_[started_++]];
        thread->state = State::running;
        acquire(&start_);
        ignore(false);
        (*kernel_)();
        ignore(true);
        release(&end_);
        thread->state = State::finished;
        ++finished_;
#if defined(__SANITIZE_THREAD__)
        break;
#endif
      }
#if defined(__SANITIZE_THREAD__)
      spent_.push_back(running_);
#else
      idle_.push_back(running_);
#endif
      yield();
    }
  }

  // Switches to a thread that has not started, else to one that is ready, else to the launch.
  void yield() {
    complete_operations();
    Fiber* to = &main_;
    if (!error_.empty()) {
      // The launch reports it.
    } else if (started_ < threads_.size()) {
      if (idle_.empty()) idle_.push_back(make());
      to = idle_.back();
      idle_.pop_back();
    } else if (next_ < ready_.size()) {
      if (adversity_ != 0) choose_next();
      thread = ready_[next_++];
      to = thread->fiber;
      if (next_ == ready_.size()) {
        ready_.clear();
        next_ = 0;
      }
    }
    if (to != running_) switch_to(to);
  }

  unsigned random() { return (seed_ = seed_ * 1664525u + 1013904223u) >> 8; }

  // Moves to the front one of a few ready threads, of the warp that is favoured most for a while: some warps run ahead.
  void choose_next() {
    if (random() % 64 == 0) favour_ = random();
    size_t best = next_;
    const auto rank = [&](size_t i) { return (ready_[i]->number / kWarp * 0x9e3779b9u) ^ favour_; };
    for (int tries = 0; tries < 3; ++tries) {
      const size_t other = next_ + random() % (ready_.size() - next_);
      if (tries == 0 || rank(other) < rank(best)) best = other;
    }
    std::swap(ready_[next_], ready_[best]);
  }

  bool idle() const { return started_ == threads_.size() && next_ == ready_.size(); }

  // Completes operations of units: some at random, and as many as it takes for a thread to go on. What is under way
  // when all threads have finished never completes.
  void complete_operations() {
    static constexpr unsigned kOneIn[] = {0, 16, 2};
    while (!under_way_.empty() && error_.empty() && finished_ != threads_.size()) {
      if (!idle() && (late_ == 0 || random() % kOneIn[late_] != 0)) return;
      std::swap(under_way_[random() % under_way_.size()], under_way_.back());
      const std::function<void()> complete = std::move(under_way_.back());
      under_way_.pop_back();
      complete();
    }
  }

  std::string where() const {
    static const char* const names[] = {
        "not started", "running", "at a barrier", "at a warp collective", "waiting for a barrier's phase", "finished"};
    std::ostringstream text;
    text << "; block (" << index.x << ", " << index.y << ", " << index.z << ")";
    for (size_t i = 0, shown = 0; i < threads_.size() && shown < 8; ++i) {
      if (i == 0 || threads_[i].state != threads_[i - 1].state) {
        text << ", from thread " << i << " on " << names[int(threads_[i].state)];
        ++shown;
      }
    }
    return text.str();
  }

  void prepare_shared(size_t bytes) {
    if (shared_ == nullptr) shared_ = static_cast<char*>(std::aligned_alloc(1024, kMostShared / 1024 * 1024));
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared_, kMostShared);
    __asan_poison_memory_region(shared_ + bytes, kMostShared - bytes);
#endif
    std::memset(shared_, 0xff, bytes);
    shared_bytes_ = bytes;
  }

  Fiber* make() {
    auto* fiber = new Fiber;
    void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);
    fiber->stack = static_cast<char*>(memory) + kGuard;
#if defined(__SANITIZE_THREAD__)
    fiber->sanitizer = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
    // The stack that swap_stacks expects: six registers below the return address `entry`.
    auto** top = reinterpret_cast<void**>(fiber->stack + kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber->stack_pointer = top;
#else
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, &entry, 0);
#endif
    fibers_.push_back(fiber);
    return fiber;
  }
  static void discard(Fiber* fiber) {
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(fiber->sanitizer);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber->stack, kStack);  // frames of a thread that did not return
#endif
    munmap(fiber->stack - kGuard, kStack + kGuard);
    delete fiber;
  }

#if defined(__x86_64__)
  __attribute__((naked, noinline)) static void swap_stacks(void** /*from*/, void* /*to*/) {
    __asm__(
        "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15; movq %rsp, (%rdi); movq %rsi, %rsp;"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
  }
#endif

  __attribute__((noinline, no_sanitize("thread"))) void switch_to(Fiber* to) {
    Fiber* from = running_;
    running_ = to;
#if defined(__x86_64__)
    // Read first: no instrumented code may run between the sanitizer's switch and the switch of stacks.
    void** save = &from->stack_pointer;
    void* stack_pointer = to->stack_pointer;
#endif
#if defined(__SANITIZE_THREAD__)
    ignore(false);  // a fiber that ignores accesses cannot be destroyed
    if (from->sanitizer == nullptr) from->sanitizer = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to->sanitizer, __tsan_switch_to_fiber_no_sync);
#elif defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from->sanitizer, to->stack ? to->stack : main_bottom_,
                                   to->stack ? kStack : main_bytes_);
#endif
#if defined(__x86_64__)
    swap_stacks(save, stack_pointer);
#else
    swapcontext(&from->context, &to->context);
#endif
    ignore(true);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from->sanitizer, nullptr, nullptr);
#endif
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<unsigned> order_;
  size_t started_ = 0, finished_ = 0, waiting_ = 0;
  std::vector<Thread*> ready_;
  size_t next_ = 0;
  Fiber main_, *running_ = &main_;
  std::vector<Fiber*> fibers_, idle_, spent_;
  int total_ = 0, result_ = 0;
  unsigned generation_ = 0;
  std::vector<std::pair<const void*, std::unique_ptr<Unit>>> units_;
  std::vector<std::function<void()>> under_way_;
  unsigned adversity_ = 0, seed_ = 0, late_ = 0, favour_ = 0;
  char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  std::string error_;
  char start_, end_, barriers_[2];  // their addresses identify happens-before edges
  const void* main_bottom_ = nullptr;
  size_t main_bytes_ = 0;
};

// Keeps the emulation's own accesses from ThreadSanitizer.
struct Ignored {
  Ignored() { Block::ignore(true); }
  ~Ignored() { Block::ignore(false); }
};

inline Thread& thread() {
  return *Block::current().thread;
}
inline unsigned lane() {
  return thread().number % kWarp;
}

// The address in shared memory, which begins at 0, of something in dynamic shared memory.
inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const char*>(p) - Block::current().shared());
}

inline cudaError_t launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  const bool fits = grid.count() > 0 && grid.x <= kMostBlocksX && grid.y <= kMostBlocksYZ && grid.z <= kMostBlocksYZ &&
                    block.count() > 0 && block.count() <= kMostThreads && block.z <= 64;
  if (!fits) return cudaErrorInvalidConfiguration;
  if (shared > kMostShared) return cudaErrorInvalidValue;
  Settings& s = settings();
  ++s.launches;
  s.blocks = grid.count(), s.threads = block.count(), s.shared = shared;
  s.conflicts = 0;
  Block& b = Block::current();
  b.grid = grid, b.size = block;
  for (size_t i = 0; i < grid.count(); ++i) {
    const size_t at = s.order % 2 ? grid.count() - 1 - i : i;
    b.index = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)};
    b.run(kernel, shared, s.order);
  }
  return cudaSuccess;
}

// Launches kernel(args...), or records the launch.
template <class... Params>
cudaError_t launch(dim3 grid, dim3 block, size_t shared, void (*kernel)(Params...), Params... args) {
  Settings& s = settings();
  if (!s.record) return launch(grid, block, shared, [&] { kernel(args...); });
  Dl_info module;
  if (!dladdr(reinterpret_cast<void*>(kernel), &module)) return cudaErrorInvalidValue;
  const size_t offset = reinterpret_cast<char*>(kernel) - static_cast<char*>(module.dli_fbase);
  std::string bytes;
  auto append = [&bytes](const auto& arg) {
    bytes.resize((bytes.size() + alignof(decltype(arg)) - 1) / alignof(decltype(arg)) * alignof(decltype(arg)));
    bytes.append(reinterpret_cast<const char*>(&arg), sizeof(arg));
  };
  (append(args), ...);
  s.recorded.push_back({offset, grid, block, shared, std::move(bytes)});
  return cudaSuccess;
}

// The value of lane `source`, or all bits set (a NaN) if the mask lacks that lane.
template <class T>
T shuffle(unsigned mask, const void* which, T value, unsigned source) {
  struct Operand {
    T value;
    unsigned source;
  };
  return Block::current().collective<T>(mask, which, Operand{value, source}, [](unsigned l, const Operand* const* in) {
    const Operand* from = in[l]->source < kWarp ? in[in[l]->source] : nullptr;
    T result;
    if (from == nullptr) std::memset(&result, 0xff, sizeof(T));
    return from == nullptr ? result : from->value;
  });
}
inline char by_index, by_up, by_down, by_xor, ballots, warps;  // their addresses identify collectives

// Atomic operations need no more than a read and a write: one CPU thread runs all fibers.
template <class T, class F>
T modify(T* p, const F& f) {
#if defined(__SANITIZE_THREAD__)
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  const T old = *p;
  *p = f(old);
#if defined(__SANITIZE_THREAD__)
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
  return old;
}

}  // namespace emulation

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  const emulation::Settings& s = emulation::settings();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = s.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = s.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = s.capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(s.capability == 80 ? 163 * 1024 : s.capability == 90 ? emulation::kMostShared : 99 * 1024);
      break;
  }
  return cudaSuccess;
}

#define threadIdx (emulation::thread().index)
#define blockIdx (emulation::Block::current().index)
#define blockDim (emulation::Block::current().size)
#define gridDim (emulation::Block::current().grid)

inline void __syncthreads() {
  emulation::Block::current().barrier(0);
}
inline int __syncthreads_count(int predicate) {
  return emulation::Block::current().barrier(predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return __syncthreads_count(predicate) > 0;
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulation::Block::current().collective<unsigned>(mask, &emulation::ballots, predicate,
                                                          [](unsigned, const int* const* in) {
                                                            unsigned votes = 0;
                                                            for (unsigned l = 0; l < emulation::kWarp; ++l)
                                                              votes |= unsigned(in[l] && *in[l]) << l;
                                                            return votes;
                                                          });
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, !predicate) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::Block::current().collective<int>(mask, &emulation::warps, 0,
                                              [](unsigned, const int* const*) { return 0; });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned base = emulation::lane() / width * width;
  return emulation::shuffle(mask, &emulation::by_index, value, base + unsigned(source) % width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle(mask, &emulation::by_up, value, lane % width < delta ? lane : lane - delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle(mask, &emulation::by_down, value,
                            lane % width + delta >= unsigned(width) ? lane : lane + delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned lane = emulation::lane(), source = lane ^ unsigned(bits);
  return emulation::shuffle(mask, &emulation::by_xor, value, source / width > lane / width ? lane : source);
}

template <class T>
T atomicAdd(T* p, std::common_type_t<T> value) {
  return emulation::modify(p, [&](T old) { return T(old + value); });
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> value) {
  return emulation::modify(p, [&](T old) { return std::max(old, value); });
}
template <class T>
T atomicExch(T* p, std::common_type_t<T> value) {
  return emulation::modify(p, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return emulation::modify(p, [&](T old) { return old == expected ? value : old; });
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned(uint64_t(a) * b >> 32);
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return uint64_t(static_cast<unsigned __int128>(a) * b >> 64);
}
// The four bytes of y:x that the low bits of each hexadecimal digit of `selector` name.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline float __uint_as_float(unsigned v) {
  float result;
  std::memcpy(&result, &v, sizeof(v));
  return result;
}
inline float rsqrtf(float v) {
  return 1.f / std::sqrt(v);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
using std::max;
using std::min;
