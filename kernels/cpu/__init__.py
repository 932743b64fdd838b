"""The network on the CPU: vector kernels written as LLVM IR, the threads that run them, and what NumPy does in between."""
