// A fiber: a stack of its own on which a function runs until it switches back. x86-64 Linux
// switches in 15 instructions; elsewhere ucontext does, at the price of a system call each way.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if !(defined(__x86_64__) && defined(__linux__)) && !defined(FASTATTN_UCONTEXT)
#define FASTATTN_UCONTEXT
#endif
#if defined(FASTATTN_UCONTEXT)
#include <ucontext.h>
#endif

namespace fastattn::host {

constexpr size_t kStackBytes = 256 << 10;  // touched as needed: an unwinding exception takes 20 KB

inline char* new_stack() {
  void* stack =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) throw std::runtime_error("fastattn: no memory for a thread's stack");
  return static_cast<char*>(stack);
}

#if defined(FASTATTN_UCONTEXT)

class Fiber {
 public:
  void start(char* stack, void (*entry)()) {
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack;
    inside_.uc_stack.ss_size = kStackBytes;
    inside_.uc_link = nullptr;
    makecontext(&inside_, entry, 0);
  }
  void enter() { swapcontext(&outside_, &inside_); }
  void leave() { swapcontext(&inside_, &outside_); }

 private:
  ucontext_t inside_, outside_;
};

#else

// Pushes the registers that a call preserves, keeps the stack pointer in *from, and returns on the
// stack `to`, as its switch left it.
extern "C" void fastattn_switch_stack(void** from, void* to);
asm(R"(
.text
.p2align 4
.local fastattn_switch_stack
.type fastattn_switch_stack, @function
fastattn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastattn_switch_stack, .-fastattn_switch_stack
)");

class Fiber {
 public:
  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes - 56);  // 8 past a multiple of 16
    top[0] = nullptr;  // where entry would return to: the unwinder stops here
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    inside_ = top;
  }
  void enter() { fastattn_switch_stack(&outside_, inside_); }
  void leave() { fastattn_switch_stack(&inside_, outside_); }

 private:
  void *inside_, *outside_;
};

#endif

}  // namespace fastattn::host
