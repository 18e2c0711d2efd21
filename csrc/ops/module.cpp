// The module fastattn._C, and what the kernels ask of torch: its threads.
#include <Python.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>

#include "../cpu/kernels.h"

namespace fastattn {

void run_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) body(context, task);
  };
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = tasks < threads ? tasks : threads;
  if (workers <= 1)
    work(0, 0);
  else
    torch::stable::parallel_for(0, workers, 1, work);
}

float* thread_scratch(int slot, int64_t floats) {
  struct Buffer {
    float* data = nullptr;
    int64_t floats = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[16];
  Buffer& buffer = buffers[slot];
  if (buffer.floats < floats) {
    std::free(buffer.data);
    buffer.floats = (floats + 1023) / 1024 * 1024;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, buffer.floats * sizeof(float)));
    STD_TORCH_CHECK(buffer.data != nullptr, "fastattn: out of memory for a kernel's scratch");
  }
  return buffer.data;
}

}  // namespace fastattn

// Importing fastattn._C loads the operators; what the module itself offers is isa().
static PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastattn::kernels().isa); }
static PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set that the CPU kernels use."}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  return PyModule_Create(&module);
}
