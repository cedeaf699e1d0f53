// The emulation's controls, and kernels that try it, as a Python module. The CUDA operators linked into it register
// themselves in the namespace alexnet_kernels_emulated, for CPU tensors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulation/trials.h"

namespace py = pybind11;
using Floats = py::array_t<float, py::array::c_style>;
using Extent = std::array<unsigned, 3>;

PYBIND11_MODULE(cuda_emulation, m) {
  m.def(
      "set_order", [](unsigned seed) { emulation::settings().order = seed; }, py::arg("seed"),
      "Threads and blocks start in their order (0) or in the order that a seed gives.");
  m.def("last_launch", [] {
    const emulation::Settings& s = emulation::settings();
    return py::dict(py::arg("launches") = s.launches, py::arg("blocks") = s.blocks, py::arg("threads") = s.threads,
                    py::arg("shared") = s.shared);
  });
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
