// The step from one fiber to another, in the machine's own words. x86-64 only.

// Saves the registers that a call preserves, and continues on the other stack.
asm(R"(.text
.globl rt_switch
.type rt_switch,@function
rt_switch:
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
.size rt_switch, .-rt_switch
)");
