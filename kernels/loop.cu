// The kernel that a WHILE node of a CUDA graph repeats its body by. It is a program of its own because its symbol is
// resolved by the driver when it is loaded.
#include "constants.cuh"
#include "common.cuh"
#include "layout.cuh"
#include "turnover.cuh"

extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned value);

KERNEL(turnover_while)(const Solve* s) {
    TEAM;
    wait_for_inputs();
    bool goes_on = turnover(team, *s);
    if (team.first() && s->conditional) cudaGraphSetConditional(s->conditional, goes_on);
}
