// The module fastattn._C, and what the kernels ask of torch: its threads.
#include <Python.h>
#if !defined(_WIN32)
#include <pthread.h>
#endif
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <exception>

#include "../cpu/dispatch.h"

namespace fastattn {

// A child of fork() has none of the threads that its parent's pool counts on: torch's parallel_for
// waits for them for ever. So a child works alone.
static std::atomic<bool> forked{false};
#if !defined(_WIN32)
[[maybe_unused]] static const int watches_forks =
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

void run_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // the first: torch's parallel_for would lose what it says
  const auto work = [&](int64_t, int64_t) {
    try {
      for (int64_t task = next++; task < tasks; task = next++) body(context, task);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      next = tasks;
    }
  };
  const int64_t threads = forked ? 1 : torch::stable::get_num_threads();
  const int64_t workers = tasks < threads ? tasks : threads;
  if (workers <= 1)
    work(0, 0);
  else
    torch::stable::parallel_for(0, workers, 1, work);
  if (error) std::rethrow_exception(error);
}

float* thread_scratch(int slot, int64_t floats) {
  static thread_local Memory buffers[16];
  return buffers[slot].reserve(floats);
}

Memory::~Memory() { std::free(data_); }

float* Memory::reserve(int64_t floats) {
  if (data_ != nullptr && floats <= floats_) return data_;
  std::free(data_);
  floats_ = floats / 1024 * 1024 + 1024;
  data_ = static_cast<float*>(std::aligned_alloc(64, floats_ * sizeof(float)));
  STD_TORCH_CHECK(data_ != nullptr, "fastattn: out of memory for a kernel's scratch");
  return data_;
}

}  // namespace fastattn

// Importing fastattn._C loads the operators. The module itself tells and sets the instruction set.
static PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastattn::isa().isa); }

static PyObject* isas(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const fastattn::Isa* each = fastattn::begin_isas(); each != fastattn::end_isas(); ++each) {
    PyObject* row = Py_BuildValue(
        "(siO)", each->kernels->isa, each->kernels->lanes, each->runs_here() ? Py_True : Py_False);
    PyList_Append(list, row);
    Py_DECREF(row);
  }
  return list;
}

static PyObject* use_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (bytes == nullptr) return nullptr;
  const bool done = fastattn::use_isa(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  return PyBool_FromLong(done);
}

static PyObject* fma_loop(PyObject*, PyObject* arguments) {
  long long tasks, steps;
  if (!PyArg_ParseTuple(arguments, "LL", &tasks, &steps)) return nullptr;
  static std::atomic<float> result;  // or the loops would be dead code
  fastattn::parallel_tasks(tasks, [&](int64_t) { result = fastattn::isa().fma_loop(steps); });
  return PyFloat_FromDouble(fastattn::isa().fma_loop_flops * tasks * steps);
}

#if !defined(FASTATTN_CUDA_ARCHITECTURES)
#define FASTATTN_CUDA_ARCHITECTURES ""
#endif
static PyObject* cuda_architectures(PyObject*, PyObject*) {
  return PyUnicode_FromString(FASTATTN_CUDA_ARCHITECTURES);
}

static PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set in use."},
    {"cuda_architectures", cuda_architectures, METH_NOARGS,
     "What the CUDA kernels were compiled for, with spaces between; empty without them."},
    {"fma_loop", fma_loop, METH_VARARGS,
     "(tasks, steps) -> flops: tasks on torch's threads of nothing but multiply-adds."},
    {"isas", isas, METH_NOARGS, "[(name, lanes, whether this processor runs it)]."},
    {"use_isa", use_isa, METH_O, "Uses another set from now on; False where it cannot."},
    {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  if (!fastattn::choose_isa()) {
    PyErr_Format(
        PyExc_ImportError,
        "FASTATTN_ISA=%s is not an instruction set that was built and runs on this processor",
        std::getenv("FASTATTN_ISA"));
    return nullptr;
  }
  return PyModule_Create(&module);
}
