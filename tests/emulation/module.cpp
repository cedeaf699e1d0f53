// The emulation's settings and its test kernels as a Python module. The CUDA operators that are linked into it register
// themselves in torch's namespace alexnet_kernels_emulated, for CPU tensors.
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
      "Threads and blocks start in index order (0) or in the permutation of a seed.");
  m.def("last_launch", [] {
    const emulation::Settings& s = emulation::settings();
    return py::dict(py::arg("launches") = s.launches, py::arg("blocks") = s.blocks, py::arg("threads") = s.threads,
                    py::arg("shared") = s.shared);
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
