// The emulation's settings and its test kernels as a Python module. The CUDA operators that are linked into it register
// themselves in torch's namespace alexnet_kernels_emulated, for CPU tensors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulation/hopper_trials.h"
#include "emulation/trials.h"

namespace py = pybind11;
namespace cuda = alexnet_kernels::cuda;
using Floats = py::array_t<float, py::array::c_style>;
using Extent = std::array<unsigned, 3>;

PYBIND11_MODULE(cuda_emulation, m) {
  m.def(
      "set_order", [](unsigned seed) { emulation::settings().order = seed; }, py::arg("seed"),
      "Threads and blocks start in index order (0) or in the permutation of a seed.");
  m.def(
      "set_device",
      [](int capability, int multiprocessors) {
        emulation::settings().capability = capability;
        emulation::settings().multiprocessors = multiprocessors;
      },
      py::arg("capability") = 90, py::arg("multiprocessors") = 132,
      "The device's compute capability, 90 for 9.0, and number of multiprocessors.");
  m.def("last_launch", [] {
    const emulation::Settings& s = emulation::settings();
    return py::dict(py::arg("launches") = s.launches, py::arg("blocks") = s.blocks, py::arg("threads") = s.threads,
                    py::arg("shared") = s.shared, py::arg("conflicts") = s.conflicts);
  });
  m.def(
      "set_recording",
      [](bool record) {
        emulation::settings().record = record;
        emulation::settings().recorded.clear();
      },
      py::arg("record"), "Launches are recorded from now on, and not run, or run again.");
  m.def(
      "recorded",
      [] {
        py::list launches;
        for (const emulation::Launch& l : emulation::settings().recorded) {
          launches.append(py::make_tuple(l.kernel, Extent{l.grid.x, l.grid.y, l.grid.z},
                                         Extent{l.block.x, l.block.y, l.block.z}, l.shared, py::bytes(l.arguments)));
        }
        return launches;
      },
      "The recorded launches: offset of the kernel's function in this module, grid, block, bytes of dynamic shared "
      "memory, bytes of the parameters.");
  m.def("describe", [](int row_bytes, uint32_t address) {
    const char* matrix = emulation::Block::current().shared() + address;
    return row_bytes == 32   ? cuda::describe<32>(matrix)
           : row_bytes == 64 ? cuda::describe<64>(matrix)
                             : cuda::describe<128>(matrix);
  });
  m.def("describe_transposed", [](int row_bytes, uint32_t address, int next) {
    const char* matrix = emulation::Block::current().shared() + address;
    return row_bytes == 64 ? cuda::describe_transposed<64>(matrix, next) : cuda::describe_transposed<128>(matrix, next);
  });
  m.def(
      "transposed",
      [](uint64_t descriptor, uint32_t term, uint32_t row) {
        emulation::Matrix matrix(descriptor);
        matrix.shared = nullptr, matrix.bytes = size_t(-1);
        return reinterpret_cast<uintptr_t>(matrix.eight_of_term(term, row));
      },
      "The address of elements row to row + 7 of a term.");
  m.def("swizzled", emulation::swizzled);
  m.def(
      "encode",
      [](uintptr_t address, std::array<uint64_t, 5> sizes, std::array<uint64_t, 4> strides, std::array<uint32_t, 5> box,
         bool bf16) {
        const cuda::TensorMap map = cuda::encode({reinterpret_cast<void*>(address), sizes, strides, box, bf16});
        const emulation::TiledMap tiled = emulation::tiled_map(&map);
        for (int i = 0; i < 5; ++i) sizes[i] = uint64_t(tiled.last[i]) + 1, box[i] = tiled.box[i];
        return py::dict(py::arg("type") = int(tiled.type), py::arg("rank") = int(tiled.rank),
                        py::arg("address") = reinterpret_cast<uintptr_t>(tiled.address), py::arg("sizes") = sizes,
                        py::arg("strides") = std::vector<uint64_t>(tiled.stride, tiled.stride + 4),
                        py::arg("box") = box, py::arg("steps") = std::vector<int>(tiled.step, tiled.step + 5),
                        py::arg("swizzle") = int(tiled.swizzle));
      },
      py::arg("address"), py::arg("sizes"), py::arg("strides"), py::arg("box"), py::arg("bf16"),
      "What encode() has cuTensorMapEncodeTiled write.");
  m.def(
      "encode_tiled",
      [](int type, uint32_t rank, uintptr_t address, std::vector<uint64_t> sizes, std::vector<uint64_t> strides,
         std::vector<uint32_t> box, std::vector<uint32_t> steps, int swizzle) {
        CUtensorMap map;
        return int(cuTensorMapEncodeTiled(&map, CUtensorMapDataType(type), rank, reinterpret_cast<void*>(address),
                                          sizes.data(), strides.data(), box.data(), steps.data(),
                                          CU_TENSOR_MAP_INTERLEAVE_NONE, CUtensorMapSwizzle(swizzle),
                                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
      },
      py::arg("type"), py::arg("rank"), py::arg("address"), py::arg("sizes"), py::arg("strides"), py::arg("box"),
      py::arg("steps"), py::arg("swizzle"), "The error of cuTensorMapEncodeTiled.");
  m.def(
      "run_pipeline",
      [](const std::string& fault, const Floats& in, Floats& out, std::vector<int64_t> options) {
        trials::run_pipeline(fault, {in.data(), out.mutable_data(), int(in.size()), std::move(options)});
      },
      py::arg("fault"), py::arg("in"), py::arg("out").noconvert(), py::arg("options"),
      "Runs the kernel of hopper_trials.h with a fault, or \"none\".");
  m.def(
      "run",
      [](const std::string& trial, const Floats& in, Floats& out, Extent grid, Extent block, size_t shared,
         std::vector<int64_t> options) {
        trials::run(trial, {in.data(), out.mutable_data(), int(in.size()), std::move(options)},
                    {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared);
      },
      py::arg("trial"), py::arg("in"), py::arg("out").noconvert(), py::arg("grid"), py::arg("block"), py::arg("shared"),
      py::arg("options"));
}
