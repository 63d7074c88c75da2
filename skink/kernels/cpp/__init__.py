"""The C++ kernels as PyTorch operators: `torch.ops.skink_cpp.*`, once `library()` has loaded them."""

from skink.kernels.cpp.library import Library, library, use_instruction_set

__all__ = ["Library", "library", "use_instruction_set"]
