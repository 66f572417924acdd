// The Python module upstep_fast._C: build information of the compiled files, and GateFlag.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>

#include "gate_flag.h"

namespace py = pybind11;

namespace {

// keeps the tensor, and so the memory, alive
struct Flag : upstep::GateFlag {
  explicit Flag(py::object memory)
      : upstep::GateFlag(reinterpret_cast<int64_t*>(address_of(memory))), memory(std::move(memory)) {}

  static int64_t address_of(const py::object& memory) {
    const bool fits = memory.attr("device").attr("type").cast<std::string>() == "cpu" &&
                      memory.attr("numel")().cast<int64_t>() == 1 &&
                      memory.attr("element_size")().cast<int64_t>() == sizeof(int64_t);
    if (!fits) throw py::value_error("GateFlag: memory must be an int64 tensor of one cell in host memory");
    return memory.attr("data_ptr")().cast<int64_t>();
  }

  py::object memory;
};

std::pair<bool, bool> wait(const Flag& flag, int64_t sequence, double timeout) {
  using namespace std::chrono;
  if (sequence < 1 || !(timeout >= 0))
    throw py::value_error("GateFlag.wait: sequence must be at least 1 and timeout a number of seconds, at least 0");
  const auto end = steady_clock::now() + duration_cast<nanoseconds>(duration<double>(std::min(timeout, 1e9)));
  bool came = false;
  while (!came) {
    const nanoseconds left = end - steady_clock::now();
    {
      py::gil_scoped_release release;
      // in slices, so that Ctrl-C is heard
      came = flag.wait(sequence, std::clamp<nanoseconds>(left, nanoseconds(0), milliseconds(100)));
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!came && left <= nanoseconds(0)) {
      PyErr_Format(PyExc_TimeoutError, "GateFlag.wait: decision %lld did not come in time; the latest is %lld",
                   static_cast<long long>(sequence), static_cast<long long>(flag.latest().sequence));
      throw py::error_already_set();
    }
  }
  const upstep::Decision decision = flag.latest();
  if (decision.sequence != sequence)
    throw std::runtime_error("GateFlag.wait: decision " + std::to_string(sequence) + " was overwritten by decision " +
                             std::to_string(decision.sequence) + ": wait for each before the next step is launched");
  return {decision.is_open, decision.is_finite};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the compiled files, and the flag in which a kernel reports its decision to the host.";
  py::dict info;
  info["version"] = UPSTEP_FAST_VERSION;
  info["compiler"] = UPSTEP_FAST_COMPILER;
  info["torch_built"] = UPSTEP_FAST_TORCH_BUILT;
  info["torch_target"] = UPSTEP_FAST_TORCH_TARGET;
  info["cuda"] = UPSTEP_FAST_CUDA_VERSION;
  info["architectures"] = UPSTEP_FAST_CUDA_BUILT;
  m.attr("BUILD_INFO") = info;

  py::class_<Flag>(m, "GateFlag",
                   "A word of host memory that says what the gate decided, and at which step.\n\n"
                   "memory: int64 tensor of one cell on the CPU, 0 at the start; pinned where a GPU writes it.")
      .def(py::init<py::object>(), py::arg("memory"))
      .def("wait", &wait, py::arg("sequence"), py::arg("timeout") = 30.0,
           "Waits, without the GIL, for the decision of step `sequence` (the first is 1).\n\n"
           "timeout: seconds. Returns (is_open, is_finite). Raises TimeoutError, and RuntimeError where a later\n"
           "decision has taken its place.")
      .def("publish", [](Flag& f, int64_t sequence, bool is_open, bool is_finite) {
             f.publish(sequence, is_finite, is_open);
           }, py::arg("sequence"), py::arg("is_open"), py::arg("is_finite") = true,
           "Writes a decision from the host.")
      .def_property_readonly("sequence", [](const Flag& f) { return f.latest().sequence; },
                             "Step of the latest decision; 0: none yet.")
      .def_property_readonly("address", [](const Flag& f) { return Flag::address_of(f.memory); },
                             "Where the word lies, for the op that writes it.");
}
