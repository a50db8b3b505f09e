// What a launch changes in its process, for the time of the launch.
#pragma once

#include <xmmintrin.h>

#include <csignal>

#include "scheduler.h"

namespace guards {

inline struct sigaction old_segv, old_bus, old_fpe;

// A fault inside a kernel ends the launch with a message. Continues on the main stack, which the
// handler may do because a fault is synchronous.
inline void on_signal(int signal, siginfo_t* info, void*) {
  if (!current) {
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaction(SIGFPE, &old_fpe, nullptr);
    return;  // not ours: faults again, in the former handler
  }
  if (signal == SIGFPE) rt_fail("integer division by zero or overflow");
  rt_fail("out of bounds access at address %p: build=\"check\" tells where", info->si_addr);
}

class SignalGuard {
 public:
  SignalGuard() {
    static char stack[64 << 10];
    stack_t alternative{};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof stack;
    sigaltstack(&alternative, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
    sigaction(SIGFPE, &action, &old_fpe);
  }
  ~SignalGuard() {
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaction(SIGFPE, &old_fpe, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  stack_t old_stack_;
};

class FlushGuard {
 public:
  explicit FlushGuard(bool flush) : old_(_mm_getcsr()) {
    constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
    if (flush) _mm_setcsr(old_ | kFlushToZero | kDenormalsAreZero);
  }
  ~FlushGuard() { _mm_setcsr(old_); }

 private:
  unsigned old_;
};

}  // namespace guards
