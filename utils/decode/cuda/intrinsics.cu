// What the kernels need of the GPU itself, one function an instruction. Nothing else in this folder holds
// assembly, so the tests can compile the kernels for a CPU, with these functions in plain C++ instead.

typedef unsigned short bits16;  // a bfloat16, or a float16 where HALF is 1

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 all_of_it[];
  return (char*)all_of_it;
}

// A value that all lanes of a warp have: said so, the compiler branches and addresses by it once a warp.
__device__ __forceinline__ int same_in_warp(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// 16 bytes that are read once: they take no room in the cache of the multiprocessor.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// Four of the eight bytes of `low` and `high`, named by the four half bytes of `which`, each below 8.
__device__ __forceinline__ unsigned select_bytes(unsigned low, unsigned high, unsigned which) {
  unsigned bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(which));
  return bytes;
}

// Two floats rounded to 16 bits, the first in the low half.
__device__ __forceinline__ unsigned round_pair(float first, float second) {
  unsigned pair;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#endif
  return pair;
}

__device__ __forceinline__ float low_float(unsigned pair) {
#if HALF
  float value;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(value) : "r"(pair));
  return value;
#else
  return __uint_as_float(pair << 16);
#endif
}

__device__ __forceinline__ float high_float(unsigned pair) {
#if HALF
  float value;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(value) : "r"(pair));
  return value;
#else
  return __uint_as_float(pair & 0xffff0000u);
#endif
}

// c += a b on the tensor cores: a [16, 16] in rows, b [16, 8] in columns, c [16, 8]. With g = lane / 4 and
// t = lane % 4 a lane holds of a the rows g (a0, a2) and g + 8 (a1, a3), at columns 2t, 2t+1 (a0, a1) and
// 2t+8, 2t+9 (a2, a3); of b the same places of column g; of c (g; 2t, 2t+1), then (g + 8; 2t, 2t+1).
__device__ __forceinline__ void multiply_tile(
    float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#if HALF
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Programmatic dependent launch: a kernel starts while the one before still runs, and what it may do then is
// read what no kernel writes. After `wait_for_previous` all that came before is done and can be seen.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ float power_of_two(float exponent) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(exponent));
  return value;
}

// A number that another block has just written: not from the cache of this multiprocessor.
__device__ __forceinline__ float load_fresh(const float* from) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from));
  return value;
}

// A flag between blocks: what was written before it is set can be read by who has seen it.
__device__ __forceinline__ void store_release(unsigned* to, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" : : "l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
