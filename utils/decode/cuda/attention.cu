// Attention of the newest tokens over all that came before: only the tokens that exist are read.
//
// A block has QUERIES of the queries that share a head of keys, and a stretch of its keys: gridDim.x stretches
// run at once. Each warp goes along on its own and keeps a running maximum, sum and result (online softmax);
// then they meet in shared memory, and the block of the last stretch to be done adds up all of them. The new
// tokens' keys are rotated here, used and written to the cache; queries too, where the model norms and rotates.

struct Attention {
  const bits16* q;  // [tokens, q_stride]; token = conversation * new + i, the i-th of `new` tokens
  const bits16* k;  // [tokens, kv_stride]
  const bits16* v;
  bits16* keys;         // [places, kv_heads, capacity, HEAD_DIM]
  bits16* values;
  const bits16* cos;    // [positions, HEAD_DIM]
  const bits16* sin;
  const bits16* q_norm;  // [HEAD_DIM], or null
  const bits16* k_norm;
  const int* lengths;   // [places]: tokens in the cache; below 0 where there is no conversation
  const long long* places;  // [conversations]: where in lengths, keys and values each is; or null, in order
  float* partials;      // [conversations, gridDim.y, QUERIES, gridDim.x, HEAD_DIM + 2]
  unsigned* arrived;    // [conversations, gridDim.y], zeros
  bits16* out;          // [tokens, heads * HEAD_DIM]
  int kv_heads, group, fresh, capacity, q_stride, kv_stride;
  int window;  // a token sees so many, itself included; 0: all
  float scale, epsilon;
};

#define ATTENTION_WARPS 4
#define LANES (HEAD_DIM <= 8 ? 1 : HEAD_DIM <= 16 ? 2 : HEAD_DIM <= 32 ? 4 : HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32)
#define KEYS (32 / LANES)  // of a warp at once; LANES lanes have 8 numbers each of one key
#define AHEAD 4            // of these under way from memory
#define MOST_FRESH 8
#define STATE (HEAD_DIM + 2)  // result, maximum, sum
#define NOTHING (-1e30f)      // the maximum of no score

// One head of one token, normed and rotated, into `to` [HEAD_DIM] in shared memory; by one warp.
__device__ __forceinline__ void prepare_head(
    const Attention& p, const bits16* from, const bits16* norm, int position, float* to) {
  const int lane = threadIdx.x & 31, half = HEAD_DIM / 2;
  float squares = 0.f;
  for (int d = lane; d < HEAD_DIM; d += 32) {
    const float value = low_float(from[d]);
    to[d] = value, squares += value * value;
  }
  if (norm) {
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, mask);
    const float scale = rsqrtf(squares / HEAD_DIM + p.epsilon);
    for (int d = lane; d < HEAD_DIM; d += 32)
      to[d] = low_float(round_pair(low_float(round_pair(to[d] * scale, 0.f)) * low_float(norm[d]), 0.f));
  }
  __syncwarp();
  for (int d = lane; d < half; d += 32) {  // rounded after each step, as transformers does
    const float low = to[d], high = to[d + half];
    const bits16 *cos = p.cos + (size_t)position * HEAD_DIM + d, *sin = p.sin + (size_t)position * HEAD_DIM + d;
    const unsigned direct = round_pair(low * low_float(cos[0]), high * low_float(cos[half]));
    const unsigned turned = round_pair(-high * low_float(sin[0]), low * low_float(sin[half]));
    const unsigned sum = round_pair(
        low_float(direct) + low_float(turned), high_float(direct) + high_float(turned));
    to[d] = low_float(sum), to[d + half] = high_float(sum);
  }
  __syncwarp();
}

struct State {  // of one lane: its 8 numbers of the result of each query
  float most[QUERIES], sum[QUERIES], result[QUERIES][8];
};

__device__ __forceinline__ void unpack(const uint4& words, float* values) {
  values[0] = low_float(words.x), values[1] = high_float(words.x);
  values[2] = low_float(words.y), values[3] = high_float(words.y);
  values[4] = low_float(words.z), values[5] = high_float(words.z);
  values[6] = low_float(words.w), values[7] = high_float(words.w);
}

// Adds `count` keys to each query's state; `sees` says which of them a query may look at.
template <int count, class Sees>
__device__ __forceinline__ void add_keys(
    State& state, const float (*queries)[8], const uint4* keys, const uint4* values, Sees sees) {
  float scores[QUERIES][count];
#pragma unroll
  for (int i = 0; i < count; i++) {
    float key[8];
    unpack(keys[i], key);
#pragma unroll
    for (int j = 0; j < QUERIES; j++) {
      float score = 0.f;
#pragma unroll
      for (int d = 0; d < 8; d++) score += queries[j][d] * key[d];
#pragma unroll
      for (int mask = LANES / 2; mask; mask >>= 1) score += __shfl_xor_sync(0xffffffffu, score, mask);
      scores[j][i] = sees(i, j) ? score : NOTHING;
    }
  }
#pragma unroll
  for (int j = 0; j < QUERIES; j++) {
    float most = state.most[j];
#pragma unroll
    for (int i = 0; i < count; i++) most = max(most, scores[j][i]);
    const float fade = power_of_two(state.most[j] - most);
    state.most[j] = most, state.sum[j] *= fade;
#pragma unroll
    for (int d = 0; d < 8; d++) state.result[j][d] *= fade;
  }
#pragma unroll
  for (int i = 0; i < count; i++) {
    float value[8];
    unpack(values[i], value);
#pragma unroll
    for (int j = 0; j < QUERIES; j++) {
      const float share = sees(i, j) ? power_of_two(scores[j][i] - state.most[j]) : 0.f;
      state.sum[j] += share;
#pragma unroll
      for (int d = 0; d < 8; d++) state.result[j][d] += share * value[d];
    }
  }
}

// Several states [count, STATE] of one query, at number d of the result.
template <class Read>
__device__ __forceinline__ float merge(int count, int d, Read read, float& most, float& sum) {
  most = NOTHING, sum = 0.f;
#pragma unroll 8
  for (int i = 0; i < count; i++) most = max(most, read(i, HEAD_DIM));
  float result = 0.f;
#pragma unroll 8
  for (int i = 0; i < count; i++) {
    const float fade = power_of_two(read(i, HEAD_DIM) - most);
    sum += fade * read(i, HEAD_DIM + 1), result += fade * read(i, d);
  }
  return result;
}

extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32) attend(const Attention p) {
  float* queries = (float*)shared_memory();               // [QUERIES, HEAD_DIM]
  bits16* fresh_keys = (bits16*)(queries + QUERIES * HEAD_DIM);  // [MOST_FRESH, HEAD_DIM]
  bits16* fresh_values = fresh_keys + MOST_FRESH * HEAD_DIM;
  float* states = (float*)(fresh_values + MOST_FRESH * HEAD_DIM);  // [WARPS * KEYS, QUERIES, STATE]
  float* scratch = states;                                         // [WARPS, HEAD_DIM]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int parts = gridDim.y / p.kv_heads, kv_head = blockIdx.y / parts;
  const int first_query = blockIdx.y % parts * QUERIES, all_queries = p.group * p.fresh;
  const int conversation = blockIdx.z, first_token = conversation * p.fresh;
  const bool is_last = blockIdx.x == gridDim.x - 1;
  let_next_start();
  wait_for_previous();
  const int place = p.places ? (int)p.places[conversation] : conversation;
  const int past = p.lengths[place];
  if (past < 0) return;

  for (int j = warp; j < QUERIES; j += ATTENTION_WARPS) {
    const int query = min(first_query + j, all_queries - 1), i = query / p.group;
    const bits16* from = p.q + (size_t)(first_token + i) * p.q_stride +
                         (kv_head * p.group + query % p.group) * HEAD_DIM;
    prepare_head(p, from, p.q_norm, past + i, queries + j * HEAD_DIM);
  }
  const size_t cache = ((size_t)place * p.kv_heads + kv_head) * p.capacity * HEAD_DIM;
  for (int i = warp; i < p.fresh && is_last; i += ATTENTION_WARPS) {
    const size_t from = (size_t)(first_token + i) * p.kv_stride + kv_head * HEAD_DIM;
    const size_t to = cache + (size_t)(past + i) * HEAD_DIM;
    prepare_head(p, p.k + from, p.k_norm, past + i, scratch + warp * HEAD_DIM);
    for (int d = lane; d < HEAD_DIM; d += 32) {
      const bits16 key = (bits16)round_pair(scratch[warp * HEAD_DIM + d], 0.f), value = p.v[from + d];
      fresh_keys[i * HEAD_DIM + d] = key, fresh_values[i * HEAD_DIM + d] = value;
      if (first_query == 0) p.keys[to + d] = key, p.values[to + d] = value;
    }
    __syncwarp();
  }
  __syncthreads();

  const int own = lane % LANES * 8;  // the first of this lane's 8 numbers
  const bool has = own < HEAD_DIM;
  float mine[QUERIES][8];
  State state;
#pragma unroll
  for (int j = 0; j < QUERIES; j++) {
    state.most[j] = NOTHING, state.sum[j] = 0.f;
#pragma unroll
    for (int d = 0; d < 8; d++) {
      mine[j][d] = has ? queries[j * HEAD_DIM + own + d] * (p.scale * 1.4426950408889634f) : 0.f;
      state.result[j][d] = 0.f;
    }
  }
  const int step = ATTENTION_WARPS * KEYS * AHEAD;
  const int begin = p.window ? max(0, past + 1 - p.window) : 0;  // no new token sees what is before
  const int stretch = ((past - begin + (int)gridDim.x - 1) / (int)gridDim.x + step - 1) / step * step;
  const int end = min(past, begin + (int)(blockIdx.x + 1) * stretch);
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  for (int first = begin + blockIdx.x * stretch + warp * KEYS * AHEAD; first < end; first += step) {
    uint4 keys[AHEAD], values[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int key = first + i * KEYS + lane / LANES;
      const size_t at = cache + (size_t)key * HEAD_DIM + own;
      const bool there = key < end && has;
      keys[i] = there ? *(const uint4*)(p.keys + at) : zeros;
      values[i] = there ? *(const uint4*)(p.values + at) : zeros;
    }
    add_keys<AHEAD>(state, mine, keys, values, [&](int i, int j) {
      const int key = first + i * KEYS + lane / LANES;
      return key < end && (!p.window || key > past + (first_query + j) / p.group - p.window);
    });
  }
  for (int first = warp * KEYS; first < p.fresh && is_last; first += ATTENTION_WARPS * KEYS) {
    const int i = first + lane / LANES, at = min(i, p.fresh - 1) * HEAD_DIM + own;
    const uint4 key = has ? *(const uint4*)(fresh_keys + at) : zeros;
    const uint4 value = has ? *(const uint4*)(fresh_values + at) : zeros;
    add_keys<1>(state, mine, &key, &value, [&](int, int j) {
      return i < p.fresh && i <= (first_query + j) / p.group;
    });
  }
  float* state_at = states + (warp * KEYS + lane / LANES) * QUERIES * STATE;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < QUERIES; j++) {
#pragma unroll
    for (int d = 0; d < 8; d++)
      if (has) state_at[j * STATE + own + d] = state.result[j][d];
    if (own == 0) state_at[j * STATE + HEAD_DIM] = state.most[j], state_at[j * STATE + HEAD_DIM + 1] = state.sum[j];
  }
  __syncthreads();

  float* partials = p.partials + ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * QUERIES * gridDim.x * STATE;
  for (int at = threadIdx.x; at < QUERIES * HEAD_DIM; at += ATTENTION_WARPS * 32) {
    const int j = at / HEAD_DIM, d = at % HEAD_DIM;
    float most, sum;
    const float result = merge(ATTENTION_WARPS * KEYS, d, [&](int i, int number) {
      return states[(i * QUERIES + j) * STATE + number];
    }, most, sum);
    float* partial = partials + ((size_t)j * gridDim.x + blockIdx.x) * STATE;
    partial[d] = result;
    if (d == 0) partial[HEAD_DIM] = most, partial[HEAD_DIM + 1] = sum;
  }
  __threadfence();
  __syncthreads();
  unsigned* arrived = p.arrived + blockIdx.z * gridDim.y + blockIdx.y;
  unsigned* order = (unsigned*)queries;
  if (threadIdx.x == 0) {
    *order = atomicAdd(arrived, 1);
    if (*order == gridDim.x - 1) *arrived = 0;  // for the next launch
  }
  __syncthreads();
  if (*order != gridDim.x - 1) return;
  __threadfence();
  for (int at = threadIdx.x; at < QUERIES * HEAD_DIM; at += ATTENTION_WARPS * 32) {
    const int j = at / HEAD_DIM, d = at % HEAD_DIM, query = first_query + j;
    if (query >= all_queries) continue;
    float most, sum;
    const float result = merge(gridDim.x, d, [&](int i, int number) {
      return load_fresh(partials + ((size_t)j * gridDim.x + i) * STATE + number);
    }, most, sum);
    const size_t to = (size_t)(first_token + query / p.group) * p.kv_heads * p.group * HEAD_DIM;
    p.out[to + (kv_head * p.group + query % p.group) * HEAD_DIM + d] = (bits16)round_pair(result / sum, 0.f);
  }
}
