"""What to do about errors of CUDA, by their names."""

ADVICE = {
    "CUDA_ERROR_OUT_OF_MEMORY": "take a smaller capacity, or free what other programs hold on the device",
    "CUDA_ERROR_NO_DEVICE": "no NVIDIA GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_DEVICE": "there is no GPU of that number: see nvidia-smi",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the NVIDIA driver and its library differ: restart the machine",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "install a newer NVIDIA driver",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "install a newer NVIDIA driver: 580 or later for CUDA 13",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the kernels were compiled for another architecture: delete the cache of kernels",
    "CUDA_ERROR_INVALID_IMAGE": "a cached kernel is damaged: delete the cache of kernels",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "a kernel asks for more registers or shared memory than this GPU has",
}
LOST = ("the context is lost, and all memory of the device with it: start a new process, and find the kernel with"
        " `make sanitize`")
# After these nothing works in this process any more.
FATAL = {"CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_MISALIGNED_ADDRESS",
         "CUDA_ERROR_ILLEGAL_INSTRUCTION", "CUDA_ERROR_HARDWARE_STACK_ERROR", "CUDA_ERROR_LAUNCH_TIMEOUT",
         "CUDA_ERROR_INVALID_PC", "CUDA_ERROR_INVALID_ADDRESS_SPACE", "CUDA_ERROR_ASSERT"}


def advice(name: str) -> str:
    """A hint, or nothing."""
    return LOST if name in FATAL else ADVICE.get(name, "")
