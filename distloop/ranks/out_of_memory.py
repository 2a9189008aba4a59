"""Whether an error says that a device's memory has run out."""

WORDS = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "_STATUS_ALLOC_FAILED")  # of torch, CUDA, MPS


def is_out_of_memory(error: BaseException) -> bool:
    """True for torch.OutOfMemoryError, and for other errors of torch and its libraries with that meaning."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # torch may not be imported yet
    return "OutOfMemoryError" in kinds or ("RuntimeError" in kinds and any(word in str(error) for word in WORDS))
