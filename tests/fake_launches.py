"""What a driver checks of a launch before it happens: limits of the grid, of clusters and of shared memory."""

from dataclasses import dataclass
from typing import Any

from cuda.bindings import driver as real

from tests.fake_memory import Code, Violation

PROCESSORS, LARGEST_SHARED, SHARED = 132, 232_448, 48 * 1024
# Processors of each graphics cluster; a cluster of blocks lies in one of them.
GPCS = (18, 18, 16, 16, 16, 16, 16, 16)


@dataclass(frozen=True, slots=True)
class LaunchFacts:
    grid: tuple[int, int, int]
    block: int
    shared: int = 0
    cluster: int = 1
    cooperative: bool = False


def facts_of(config: Any) -> LaunchFacts:
    cluster, cooperative, kinds = 1, False, real.CUlaunchAttributeID
    for attribute in list(config.attrs)[: config.numAttrs]:
        if attribute.id == kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
            dimension = attribute.value.clusterDim
            cluster = dimension.x * dimension.y * dimension.z
        elif attribute.id == kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE:
            cooperative = bool(attribute.value.cooperative)
        elif attribute.id != kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
            raise Violation(f"the launch attribute {attribute.id} is not simulated")
    grid = config.gridDimX, config.gridDimY, config.gridDimZ
    return LaunchFacts(grid, config.blockDimX, config.sharedMemBytes, cluster, cooperative)


class FakeLaunches:
    """The part of a driver that knows kernels' attributes."""

    def __init__(self):
        self.functions: dict[int, str] = {}
        self.attributes: dict[tuple[int, str], int] = {}

    def cuFuncSetAttribute(self, function, which, value: int):
        name = which.name.removeprefix("CU_FUNC_ATTRIBUTE_")
        if int(function) not in self.functions:
            raise Violation("this is no kernel of a loaded module")
        if name not in ("MAX_DYNAMIC_SHARED_SIZE_BYTES", "NON_PORTABLE_CLUSTER_SIZE_ALLOWED"):
            raise Violation(f"the attribute {name} is not simulated, or cannot be set")
        if name == "MAX_DYNAMIC_SHARED_SIZE_BYTES" and value > LARGEST_SHARED:
            return (Code.CUDA_ERROR_INVALID_VALUE,)
        self.attributes[int(function), name] = value
        return (Code.CUDA_SUCCESS,)

    def cuOccupancyMaxActiveClusters(self, function, config):
        facts = facts_of(config)
        refusal = self.refusal(function, facts)
        if refusal is not None:
            return refusal, None
        if facts.shared <= LARGEST_SHARED // 2:
            raise Violation("several blocks on one processor are not simulated")
        return Code.CUDA_SUCCESS, sum(count // facts.cluster for count in GPCS)

    def refusal(self, function: Any, facts: LaunchFacts) -> Code | None:
        """The error of a launch that a device does not take."""

        def allowed(name: str) -> int:
            return self.attributes.get((int(function), name), 0)

        if min(*facts.grid, facts.block) < 1 or facts.block > 1024 or max(facts.grid[1:]) > 65535:
            return Code.CUDA_ERROR_INVALID_VALUE
        if facts.shared > max(SHARED, allowed("MAX_DYNAMIC_SHARED_SIZE_BYTES")):
            return Code.CUDA_ERROR_INVALID_VALUE
        largest = 16 if allowed("NON_PORTABLE_CLUSTER_SIZE_ALLOWED") else 8
        if facts.grid[0] % facts.cluster or facts.cluster > largest:
            return Code.CUDA_ERROR_INVALID_CLUSTER_SIZE
        if facts.cooperative and facts.grid[0] * facts.grid[1] > PROCESSORS:
            return Code.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
        return None
