// Kernels that are wrong, for the tests of the emulator: each mistake must show.

// Writes so many elements, which may be one too many.
KERNEL BOUNDS(64) overrun(float* out, u32 count) {
    for (u32 i = threadIdx.x; i < count; i += 64) out[i] = 1.0f;
}

// Writes past its shared memory.
KERNEL BOUNDS(64) overrun_shared(float* out) {
    SHARED(float, room, 64);
    room[threadIdx.x + 1] = 1.0f;
    sync_block();
    out[threadIdx.x] = room[threadIdx.x];
}

// Leaves one element as it was.
KERNEL BOUNDS(64) leave_one(float* out, u32 count) {
    if (threadIdx.x + 1 < count) out[threadIdx.x] = 1.0f;
}

// Adds shared memory that nobody wrote.
KERNEL BOUNDS(64) read_shared_unwritten(float* out) {
    SHARED(float, room, 64);
    if (threadIdx.x > 0) room[threadIdx.x] = 1.0f;
    sync_block();
    out[threadIdx.x] = room[threadIdx.x];
}

// Reads what another warp wrote, with no barrier between.
KERNEL BOUNDS(64) miss_barrier(float* out) {
    SHARED(float, room, 64);
    room[threadIdx.x] = 1.0f;
    out[threadIdx.x] = room[63 - threadIdx.x];
}

// Copies through shared memory; waits for the copies too late, if `early`.
KERNEL BOUNDS(64) copy_through(const float* from, float* out, u32 early) {
    SHARED(float, room, 4 * 64);
    copy_async(room + 4 * threadIdx.x, from + 4 * threadIdx.x);
    copy_async_commit();
    float before = room[4 * threadIdx.x];
    copy_async_wait<0>();
    out[threadIdx.x] = early ? before : room[4 * threadIdx.x];
}

// A sum over a warp that one lane never reaches.
KERNEL BOUNDS(64) leave_early(float* out) {
    if (threadIdx.x == 0) return;
    out[threadIdx.x] = reduce_warp<Sum>(1.0f);
}
