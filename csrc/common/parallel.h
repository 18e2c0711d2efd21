// Tasks on torch's threads, seen from kernels that include no torch header. Defined in ops.cpp.
#pragma once
#include <cstdint>

namespace fastattn {

// Calls body(context, task) once for every task in [0, tasks). Threads take the next task when
// they are free, so a task must write only what is its own, and must not care who ran before it.
// When one throws, no more are begun, and its exception comes out here.
void run_tasks(int64_t tasks, void (*body)(void* context, int64_t task), void* context);

template <class Body>
void parallel_tasks(int64_t tasks, Body body) {
  run_tasks(
      tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

// Scratch of the calling thread, 64-byte aligned, kept between calls and grown when needed. Each
// slot is one buffer; what is in it is whatever the last user left.
float* thread_scratch(int slot, int64_t floats);

// Memory of one call, for what is too large to keep.
class Memory {
 public:
  ~Memory();
  float* reserve(int64_t floats);  // what was in it is lost where it must grow

 private:
  float* data_ = nullptr;
  int64_t floats_ = 0;
};

}  // namespace fastattn
