// y = norm(x) W' for 1 to TOKENS tokens, W in 16 bits: A of the layers that share x, or the output layer.
//
// A block multiplies GROUP rows of W at a time, each thread the same columns of all of them; what x is divided
// by each block finds out for itself, which costs less than a launch. Without a norm x is taken as it is.

struct RowsProduct {
  const uint4* weight;  // [rows, width / 8] of 8 numbers
  const bits16* x;      // [tokens, width]
  const bits16* norm;   // [width], or null
  bits16* normed;       // [tokens, width]: norm(x) for those who come after; or null
  bits16* y;            // [tokens, y_stride]
  int rows, width, tokens, y_stride;
  float epsilon;
};

#define ROW_THREADS 256

__device__ __forceinline__ unsigned word_at(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// The sum over the block of each of `count` values; every thread has them.
template <int count>
__device__ __forceinline__ void sum_over_block(float* values, float* shared) {
#pragma unroll
  for (int i = 0; i < count; i++) {
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) values[i] += __shfl_xor_sync(0xffffffffu, values[i], mask);
  }
  __syncthreads();  // the values of the time before have been read
  if ((threadIdx.x & 31) == 0) {
#pragma unroll
    for (int i = 0; i < count; i++) shared[(threadIdx.x >> 5) * count + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; i++) {
    values[i] = 0.f;
#pragma unroll
    for (int warp = 0; warp < ROW_THREADS / 32; warp++) values[i] += shared[warp * count + i];
  }
}

// weight * (x * scale), each rounded, as RMSNorm of the LLaMA family does.
__device__ __forceinline__ uint4 normalize(const uint4& x, const uint4& weight, float scale) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const unsigned both = word_at(x, i), by = word_at(weight, i);
    const unsigned small = round_pair(low_float(both) * scale, high_float(both) * scale);
    words[i] = round_pair(low_float(small) * low_float(by), high_float(small) * high_float(by));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ float dot(const uint4& a, const uint4& b, float sum) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum += low_float(word_at(a, i)) * low_float(word_at(b, i));
    sum += high_float(word_at(a, i)) * high_float(word_at(b, i));
  }
  return sum;
}

__device__ __forceinline__ void load_rows(const RowsProduct& p, int first, uint4 (*weights)[CHUNKS]) {
  const int units = p.width / 8;
#pragma unroll
  for (int row = 0; row < GROUP; row++) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const int unit = c * ROW_THREADS + threadIdx.x;
      if (first + row < p.rows && unit < units)
        weights[row][c] = load_once(p.weight + (size_t)(first + row) * units + unit);
    }
  }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS) multiply_rows(const RowsProduct p) {
  float* shared = (float*)shared_memory();  // [warps, max(GROUP, 1) * TOKENS]
  const int units = p.width / 8;
  const uint4* norm = (const uint4*)p.norm;
  uint4 weights[GROUP][CHUNKS];
  int first = blockIdx.x * GROUP;
  load_rows(p, first, weights);
  let_next_start();
  wait_for_previous();

  float scales[TOKENS] = {};
  if (norm) {
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
      const uint4* x = (const uint4*)(p.x + (size_t)token * p.width);
      for (int unit = threadIdx.x; unit < units && token < p.tokens; unit += ROW_THREADS)
        scales[token] = dot(x[unit], x[unit], scales[token]);
    }
    sum_over_block<TOKENS>(scales, shared);
#pragma unroll
    for (int token = 0; token < TOKENS; token++) scales[token] = rsqrtf(scales[token] / p.width + p.epsilon);
  }
  bool writes = p.normed && blockIdx.x == 0;
  do {
    float dots[GROUP * TOKENS] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const int unit = c * ROW_THREADS + threadIdx.x;
      if (unit >= units) continue;
      const uint4 by = norm ? norm[unit] : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int token = 0; token < TOKENS; token++) {
        if (token >= p.tokens) continue;
        uint4 x = ((const uint4*)(p.x + (size_t)token * p.width))[unit];
        if (norm) x = normalize(x, by, scales[token]);
        if (writes) ((uint4*)(p.normed + (size_t)token * p.width))[unit] = x;
#pragma unroll
        for (int row = 0; row < GROUP; row++) {
          float& sum = dots[row * TOKENS + token];
          if (first + row < p.rows) sum = dot(weights[row][c], x, sum);
        }
      }
    }
    const int done = first;
    first += gridDim.x * GROUP;
    load_rows(p, first, weights);
    sum_over_block<GROUP * TOKENS>(dots, shared);
#pragma unroll
    for (int i = 0; i < GROUP * TOKENS; i++) {
      const int row = done + i / TOKENS, token = i % TOKENS;
      if (threadIdx.x == i && row < p.rows && token < p.tokens)
        p.y[(size_t)token * p.y_stride + row] = (bits16)round_pair(dots[i], 0.f);
    }
    writes = false;
  } while (first < p.rows);
}
