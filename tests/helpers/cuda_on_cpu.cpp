// A GPU of one multiprocessor, for tests: the functions of utils/decode/cuda/intrinsics.cu in plain C++, and a
// launch that runs blocks one after another. Each thread of a block is a coroutine; they take turns, and stop
// where they wait for their block or for their warp. Slow, and exact to the order of the sums.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__ static
#define __global__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; };
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;
typedef unsigned short bits16;

struct Thread {
  ucontext_t context;
  int waits_for = 0;  // 0: nothing, 1: its warp, 2: its block, 3: nothing more, it has ended
  unsigned phase = 0;
  unsigned words[2][8];  // what the others of the warp may read, of this exchange and of the one before
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static unsigned current;
static std::vector<char> shared_bytes;
static std::function<void()> body;

static void wait_for(int whom) {
  threads[current].waits_for = whom;
  swapcontext(&threads[current].context, &scheduler);
}
static void run_thread() {
  body();
  wait_for(3);
}

static inline void __syncthreads() { wait_for(2); }
static inline void __syncwarp() { wait_for(1); }

// Hands `words` to the warp; the words of the thread `lane` in the warp are then in exchanged(lane).
static void exchange(const unsigned* words, int count) {
  Thread& own = threads[current];
  own.phase++;
  memcpy(own.words[own.phase & 1], words, 4 * count);
  wait_for(1);
}
static const unsigned* exchanged(int lane) {
  Thread& other = threads[current / 32 * 32 + lane];
  return other.words[threads[current].phase & 1];
}

static inline unsigned __float_as_uint(float value) { unsigned u; memcpy(&u, &value, 4); return u; }
static inline float __uint_as_float(unsigned value) { float f; memcpy(&f, &value, 4); return f; }
template <class T> static T shuffle(T value, int lane) {
  unsigned word;
  memcpy(&word, &value, 4);
  exchange(&word, 1);
  T result;
  memcpy(&result, exchanged(lane), 4);
  return result;
}
template <class T> static T __shfl_sync(unsigned, T value, int lane) { return shuffle(value, lane); }
template <class T> static T __shfl_xor_sync(unsigned, T value, int mask) {
  return shuffle(value, (current % 32) ^ mask);
}
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float rsqrtf(float value) { return 1.f / std::sqrt(value); }
static inline void __threadfence() {}
static inline unsigned atomicAdd(unsigned* at, unsigned value) { unsigned old = *at; *at += value; return old; }

static inline char* shared_memory() { return shared_bytes.data(); }
static inline int same_in_warp(int value) { return value; }
static inline uint4 load_once(const uint4* from) { return *from; }
static inline float load_fresh(const float* from) { return *from; }
static inline void store_release(unsigned* to, unsigned value) { *to = value; }
static inline unsigned load_acquire(const unsigned* from) { return *from; }
static inline void wait_for_previous() {}
static inline void let_next_start() {}
static inline float power_of_two(float exponent) { return std::exp2(exponent); }
static inline unsigned select_bytes(unsigned low, unsigned high, unsigned which) {
  const uint64_t all = (uint64_t)high << 32 | low;
  unsigned bytes = 0;
  for (int i = 0; i < 4; i++) bytes |= (unsigned)(all >> (8 * (which >> (4 * i) & 7)) & 255) << (8 * i);
  return bytes;
}

#if HALF
static inline unsigned round_one(float value) {
  _Float16 half = (_Float16)value;
  bits16 bits;
  memcpy(&bits, &half, 2);
  return bits;
}
static inline float to_float(unsigned bits) {
  bits16 low = (bits16)bits;
  _Float16 half;
  memcpy(&half, &low, 2);
  return (float)half;
}
#else
static inline unsigned round_one(float value) {
  unsigned u = __float_as_uint(value);
  return (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}
static inline float to_float(unsigned bits) { return __uint_as_float(bits << 16); }
#endif
static inline unsigned round_pair(float first, float second) { return round_one(first) | round_one(second) << 16; }
static inline float low_float(unsigned pair) { return to_float(pair & 0xffffu); }
static inline float high_float(unsigned pair) { return to_float(pair >> 16); }

static void multiply_tile(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const unsigned words[6] = {a0, a1, a2, a3, b0, b1};
  exchange(words, 6);
  auto value = [](unsigned word, int high) { return high ? high_float(word) : low_float(word); };
  const int g = current % 32 / 4, t = current % 4;
  for (int i = 0; i < 4; i++) {
    const int row = g + 8 * (i >> 1), column = 2 * t + (i & 1);
    for (int k = 0; k < 16; k++) {
      // a: lane (row % 8) * 4 + k / 2 % 4, word row / 8 + 2 * (k / 8); b: lane column * 4 + k / 2 % 4, word k / 8
      const unsigned a = exchanged(row % 8 * 4 + k / 2 % 4)[row / 8 + 2 * (k / 8)];
      const unsigned b = exchanged(column * 4 + k / 2 % 4)[4 + k / 8];
      c[i] += value(a, k & 1) * value(b, k & 1);
    }
  }
}

static void run_block(unsigned count) {
  threads.assign(count, Thread());
  static std::vector<char> stacks;
  const size_t size = 64 << 10;
  stacks.resize(size * count);
  for (unsigned i = 0; i < count; i++) {
    getcontext(&threads[i].context);
    threads[i].context.uc_stack.ss_sp = stacks.data() + size * i;
    threads[i].context.uc_stack.ss_size = size;
    threads[i].context.uc_link = nullptr;
    makecontext(&threads[i].context, run_thread, 0);
  }
  for (;;) {
    bool ran = false;
    unsigned ended = 0, at_block = 0;
    for (unsigned warp = 0; warp < count; warp += 32) {
      unsigned at_warp = 0, left = 0;
      for (unsigned i = warp; i < min(warp + 32, count); i++) {
        while (threads[i].waits_for == 0) {
          current = i;
          threadIdx = {i, 0, 0};
          swapcontext(&scheduler, &threads[i].context);
          ran = true;
        }
        at_warp += threads[i].waits_for == 1;
        left += threads[i].waits_for != 3;
        at_block += threads[i].waits_for == 2;
        ended += threads[i].waits_for == 3;
      }
      if (at_warp && at_warp == left) {
        for (unsigned i = warp; i < min(warp + 32, count); i++)
          if (threads[i].waits_for == 1) threads[i].waits_for = 0;
        ran = true;
      }
    }
    if (ended == count) return;
    if (at_block && at_block + ended == count) {
      for (Thread& thread : threads)
        if (thread.waits_for == 2) thread.waits_for = 0;
      ran = true;
    }
    if (!ran) {
      fprintf(stderr, "threads wait for each other in block %u\n", blockIdx.x);
      abort();
    }
  }
}

static void launch(const unsigned* grid, unsigned count, unsigned shared, std::function<void()> kernel) {
  body = kernel;
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {count, 1, 1};
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        blockIdx = {x, y, z};
        shared_bytes.assign(shared + 64, (char)0xff);  // NaN, to who reads what nobody wrote
        run_block(count);
      }
}
