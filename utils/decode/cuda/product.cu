// y = [x | xa] [W | s B]' for 1 to TOKENS tokens, W in 4 bits as bitsandbytes stores it; xa = x A' is there.
//
// A weight is level[4 bits] * scale of its block, rounded to 16 bits: bit for bit what training multiplies by.
// A byte holds two weights, so a table of 256 pairs of levels turns it into two floats by one read. The table
// is repeated for each lane, 256 bytes an entry, so that 32 lanes read 32 places that never collide, and so
// that the address of an entry is the byte itself beside the lane's place: one instruction.
//
// The tensor cores multiply. A tile is 16 rows of W; a lane holds 32 weights in a row of rows g and g + 8, 16
// bytes each, and four lanes hold 128 in a row. A product of 16 columns takes 4 from each lane, whichever they
// are, as long as x lies the same way: no weight changes lanes. The adapter's B is 32 more columns, or 64.
//
// TILES tiles are done at a time, in chunks of 128 columns. The chunks of all tiles form one line, of which
// each block has an equal stretch; its warps walk along it with STAGES chunks of each under way from memory,
// also across the end of a tile, where their sums meet in shared memory. Where a stretch begins within a tile
// its sums are handed to the block that has the tile's beginning, and comes to it last.

struct Matrix {
  const uint4* packed;  // [rows, width / 32] of 32 codes; the high half of a byte comes first
  const void* scales;   // of each block: a float, or with DOUBLE its 8-bit code
  const float* outer_scales;
  const float* offset;
  const uint4* right;  // s B [rows, rank / 8] of 8 numbers; rank is a multiple of 8
  const bits16* bias;  // or null
  bits16* y;           // [tokens, y_stride]
  int rows, rank, xa_column, first_tile;
};

struct Product {
  Matrix matrices[3];
  const float* outer_code;  // [256]
  const bits16* x;          // [tokens, width]
  const bits16* xa;         // [tokens, xa_width]
  const bits16* residual;   // [tokens, y_stride], added to y; or null. May be y
  float* handed;            // [gridDim.x, OUTS]: sums of tiles that a block has only the end of
  unsigned* is_handed;      // [gridDim.x], zeros
  int count, tiles, width, xa_width, tokens, y_stride, paired;
  int block_shift, outer_shift;  // 32 codes << block_shift share a scale; as many scales an outer one
};

#define TABLE_BYTES 65536
#define THREADS (WARPS * 32)
#define ROWS (2 * TILES)  // of W in one lane

struct Place {  // in the line of chunks
  int unit, tile, chunk;
};

__device__ __forceinline__ Place advance(Place at, int chunks) {
  at.unit += WARPS, at.chunk += WARPS;
  while (at.chunk >= chunks) at.chunk -= chunks, at.tile++;
  return at;
}

// The matrix, and in `row` its first row, of one part of a tile.
__device__ __forceinline__ int find_matrix(const Product& p, int tile, int part, int& row) {
  if (p.paired) {  // gate and up: the same rows of both
    row = tile * 16;
    return part;
  }
  const int own = (p.count > 2 && tile >= p.matrices[2].first_tile) ? 2
                  : (p.count > 1 && tile >= p.matrices[1].first_tile) ? 1 : 0;
  row = ((tile - p.matrices[own].first_tile) * TILES + part) * 16;
  return own;
}

struct Rows {  // where a lane reads in the tile at hand
  int tile, own[TILES], row[ROWS];
};

__device__ __forceinline__ void enter_tile(const Product& p, int tile, Rows& rows) {
  rows.tile = tile;
#pragma unroll
  for (int part = 0; part < TILES; part++) {
    int first;
    rows.own[part] = find_matrix(p, tile, part, first);
#pragma unroll
    for (int half = 0; half < 2; half++)
      rows.row[2 * part + half] =
          min(first + half * 8 + (int)(threadIdx.x & 31) / 4, p.matrices[rows.own[part]].rows - 1);
  }
}

struct Stage {  // what a lane holds of a chunk
  uint4 codes[ROWS];
#if DOUBLE
  unsigned scale_codes[ROWS];
  float outer_scales[ROWS];
#else
  float scales[ROWS];
#endif
};

// What lies behind the last column is read from before it instead, and multiplied by zeros.
__device__ __forceinline__ void load_chunk(
    const Product& p, const Rows& rows, int chunk, int whole_chunks, Stage& stage) {
  const int units = p.width >> 5, unit = min(chunk * 4 + (int)(threadIdx.x & 3), units - 1);
  const int low_rank = (chunk - whole_chunks) * 4 + (threadIdx.x & 3);
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const Matrix& m = p.matrices[rows.own[i / 2]];
    if (chunk < whole_chunks) {
      const unsigned place = (unsigned)rows.row[i] * units + unit, block = place >> p.block_shift;
      stage.codes[i] = load_once(m.packed + place);
#if DOUBLE
      stage.scale_codes[i] = ((const unsigned char*)m.scales)[block];
      stage.outer_scales[i] = m.outer_scales[block >> p.outer_shift];
#else
      stage.scales[i] = ((const float*)m.scales)[block];
#endif
    } else if (m.rank) {
      const int units = m.rank >> 3;
      stage.codes[i] = load_once(m.right + (unsigned)(rows.row[i] * units + min(low_rank, units - 1)));
    } else {
      stage.codes[i] = make_uint4(0, 0, 0, 0);
    }
  }
}

// The two weights of byte `b`.
__device__ __forceinline__ unsigned unpack_byte(
    unsigned codes, int b, unsigned column, const char* table, float scale) {
  const float2 two = *(const float2*)(table + select_bytes(codes, column, 0x5504 | b << 4));
  return round_pair(__fmul_rn(two.x, scale), __fmul_rn(two.y, scale));
}

#if REGISTER_ROWS
// The 16 weights that a block can have, as their low and their high bytes: selected from without a table.
struct Weights {
  unsigned low[4], high[4];
};

__device__ __forceinline__ Weights scale_levels(float scale) {
  Weights w;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const unsigned a = round_pair(__fmul_rn(LEVELS[4 * i], scale), __fmul_rn(LEVELS[4 * i + 1], scale));
    const unsigned b = round_pair(__fmul_rn(LEVELS[4 * i + 2], scale), __fmul_rn(LEVELS[4 * i + 3], scale));
    w.low[i] = select_bytes(a, b, 0x6420), w.high[i] = select_bytes(a, b, 0x7531);
  }
  return w;
}

__device__ __forceinline__ void unpack_word(unsigned codes, const Weights& w, unsigned* pairs) {
  const unsigned within = codes & 0x77777777u, side = ((codes >> 1) & 0x44444444u) | 0x32103210u;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const unsigned which = within >> (16 * i), upper = side >> (16 * i);
    const unsigned low = select_bytes(
        select_bytes(w.low[0], w.low[1], which), select_bytes(w.low[2], w.low[3], which), upper);
    const unsigned high = select_bytes(
        select_bytes(w.high[0], w.high[1], which), select_bytes(w.high[2], w.high[3], which), upper);
    pairs[2 * i] = select_bytes(low, high, 0x4051), pairs[2 * i + 1] = select_bytes(low, high, 0x6273);
  }
}
#endif

__device__ __forceinline__ float find_scale(const Stage& stage, int i, const float* outer_code, float offset) {
#if DOUBLE  // rounded twice, as bitsandbytes does
  return __fadd_rn(__fmul_rn(outer_code[stage.scale_codes[i]], stage.outer_scales[i]), offset);
#else
  return stage.scales[i];
#endif
}

__device__ __forceinline__ unsigned word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

__device__ __forceinline__ void multiply_whole_chunk(
    const Product& p, int chunk, const Stage& stage, const int* own, const char* table,
    const float* outer_code, float (*sums)[4]) {
  const int lane = threadIdx.x & 31, token = lane >> 2, unit = chunk * 4 + (lane & 3);
  const bool reads = token < p.tokens && unit * 32 < p.width;
  const uint4* x = (const uint4*)(p.x + token * p.width) + unit * 4;
  const unsigned column = lane * 8;
  float scales[ROWS];
#if REGISTER_ROWS
  Weights weights[REGISTER_ROWS];
#endif
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    scales[i] = find_scale(stage, i, outer_code, outer_code[256 + own[i / 2]]);
#if REGISTER_ROWS
    if (i < REGISTER_ROWS) weights[i] = scale_levels(scales[i]);
#endif
  }
#pragma unroll
  for (int word = 0; word < 4; word++) {
    uint4 xs = make_uint4(0, 0, 0, 0);
    if (reads) xs = x[word];
#pragma unroll
    for (int part = 0; part < TILES; part++) {
      unsigned pairs[2][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int i = 2 * part + half;
        const unsigned codes = word_of(stage.codes[i], word);
#if REGISTER_ROWS
        if (i < REGISTER_ROWS) {
          unpack_word(codes, weights[i], pairs[half]);
          continue;
        }
#endif
#pragma unroll
        for (int b = 0; b < 4; b++) pairs[half][b] = unpack_byte(codes, b, column, table, scales[i]);
      }
      multiply_tile(sums[part], pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], xs.x, xs.y);
      multiply_tile(sums[part], pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3], xs.z, xs.w);
    }
  }
}

__device__ __forceinline__ void multiply_low_rank_chunk(
    const Product& p, int low_rank_chunk, const Stage& stage, const int* own, float (*sums)[4]) {
  const int token = (threadIdx.x & 31) >> 2, unit = low_rank_chunk * 4 + (threadIdx.x & 3);
#pragma unroll
  for (int part = 0; part < TILES; part++) {
    const Matrix& m = p.matrices[own[part]];
    uint4 xs = make_uint4(0, 0, 0, 0);
    if (token < p.tokens && unit * 8 < m.rank)
      xs = ((const uint4*)(p.xa + token * p.xa_width + m.xa_column))[unit];
    const uint4 upper = stage.codes[2 * part], lower = stage.codes[2 * part + 1];
    multiply_tile(sums[part], upper.x, lower.x, upper.y, lower.y, xs.x, xs.y);
    multiply_tile(sums[part], upper.z, lower.z, upper.w, lower.w, xs.z, xs.w);
  }
}

__device__ __forceinline__ float rounded(float value) { return low_float(round_pair(value, 0.f)); }

#define OUTS (TILES * 16 * TOKENS)

// The beginning of the stretch of the block at this position: the last block has the first one.
__device__ __forceinline__ int find_start(int position, int units) {
  return (int)((long long)position * units / gridDim.x);
}

// The sum over the warps, and over the blocks that have a part of this tile.
__device__ __forceinline__ float add_up(const Product& p, const float* sums, int place, int position, int helpers) {
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) sum += sums[warp * OUTS + place];
#pragma unroll 1
  for (int i = 1; i <= helpers; i++) sum += load_fresh(p.handed + (position + i) * OUTS + place);
  return sum;
}

__device__ __forceinline__ float add_bias(float y, const Matrix& m, int row) {
  return rounded(m.bias ? y + low_float(m.bias[row]) : y);
}

// This thread's part of y, when the sums of every warp [WARPS, TILES, 16, TOKENS] are there.
__device__ __forceinline__ void write_tile(
    const Product& p, int tile, const float* sums, int position, int helpers) {
  for (int place = threadIdx.x; place < (p.paired ? 16 * TOKENS : OUTS); place += THREADS) {
    const int token = place % TOKENS, part = place / TOKENS / 16;
    int row;
    const Matrix& m = p.matrices[find_matrix(p, tile, part, row)];
    row += place / TOKENS % 16;
    if (row >= m.rows || token >= p.tokens) continue;
    const int to = token * p.y_stride + row;
    float y = add_bias(add_up(p, sums, place, position, helpers), m, row);
    if (p.paired) {  // silu(gate) * up, rounded where training rounds
      const Matrix& other = p.matrices[1];
      const float up = add_bias(add_up(p, sums, 16 * TOKENS + place, position, helpers), other, row);
      y = rounded(y / (1.f + power_of_two(-1.4426950408889634f * y))) * up;
    }
    if (p.residual) y = rounded(y) + low_float(p.residual[to]);
    m.y[to] = (bits16)round_pair(y, 0.f);
  }
}

// Leaves the sums of a tile to the block that has its beginning.
__device__ __forceinline__ void hand_over(const Product& p, const float* sums, int position) {
  for (int place = threadIdx.x; place < OUTS; place += THREADS)
    p.handed[position * OUTS + place] = add_up(p, sums, place, position, 0);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) store_release(p.is_handed + position, 1);
}

// How many blocks have the rest of a tile that ends at `end`; they are done with it.
__device__ __forceinline__ int wait_for_helpers(const Product& p, int end, int position, int units) {
  int helpers = 0;
  while (position + helpers + 1 < (int)gridDim.x && find_start(position + helpers + 1, units) < end) helpers++;
  for (int i = threadIdx.x; i < helpers; i += THREADS) {
    unsigned* flag = p.is_handed + position + 1 + i;
    while (load_acquire(flag) == 0) continue;
    *flag = 0;  // for the next launch
  }
  __syncthreads();
  return helpers;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) multiply_packed(const Product p) {
  char* shared = shared_memory();
  float2* table = (float2*)shared;
  float* outer_code = (float*)(shared + TABLE_BYTES);  // and, behind it, the offset of each matrix
  float* all_sums = outer_code + 260;                  // [2, WARPS, OUTS]
  const int lane = threadIdx.x & 31, warp = same_in_warp(threadIdx.x >> 5);
  const int whole_chunks = (p.width + 127) / 128;
  const int rank = max(p.matrices[0].rank, max(p.matrices[1].rank, p.matrices[2].rank));
  const int chunks = whole_chunks + (rank + 31) / 32, units = p.tiles * chunks;
  const int position = gridDim.x - 1 - blockIdx.x;
  const int start = find_start(position, units), end = find_start(position + 1, units);

  Place at = advance(Place{start + warp - WARPS, start / chunks, start % chunks + warp - WARPS}, chunks);
  Place ahead = at;
  Rows rows, rows_at;
  enter_tile(p, ahead.tile, rows);
  rows_at = rows;
  Stage stages[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; s++) {
    if (ahead.tile != rows.tile) enter_tile(p, ahead.tile, rows);
    if (ahead.unit < end) load_chunk(p, rows, ahead.chunk, whole_chunks, stages[s]);
    ahead = advance(ahead, chunks);
  }
  for (int i = threadIdx.x; i < 256 * 32; i += THREADS)
    table[i] = make_float2(LEVELS[i >> 9], LEVELS[(i >> 5) & 15]);
#if DOUBLE
  for (int i = threadIdx.x; i < 256 + p.count; i += THREADS)
    outer_code[i] = i < 256 ? p.outer_code[i] : *p.matrices[i - 256].offset;
#endif
  let_next_start();
  wait_for_previous();
  __syncthreads();

  float sums[TILES][4] = {};
  int tile = start / chunks;  // whose sums the warps are at
  while (tile * chunks < end) {
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
      // Every warp comes by the end of every tile, also of one that it has no chunk of.
      for (; tile < at.tile && tile * chunks < end; tile++) {
        float* tile_sums = all_sums + (tile & 1) * WARPS * OUTS;
#pragma unroll
        for (int part = 0; part < TILES; part++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int row = part * 16 + (lane >> 2) + (i >> 1) * 8, token = (lane & 3) * 2 + (i & 1);
            if (token < TOKENS) tile_sums[warp * OUTS + row * TOKENS + token] = sums[part][i];
            sums[part][i] = 0.f;
          }
        }
        __syncthreads();
        if (tile * chunks < start) {
          hand_over(p, tile_sums, position);
        } else {
          const int tile_end = (tile + 1) * chunks;
          const int helpers = tile_end > end ? wait_for_helpers(p, tile_end, position, units) : 0;
          write_tile(p, tile, tile_sums, position, helpers);
        }
      }
      if (at.unit >= end) {
        at.tile = p.tiles;  // what is left are tiles that other warps have the end of
        continue;
      }
      if (at.tile != rows_at.tile) enter_tile(p, at.tile, rows_at);
      if (at.chunk < whole_chunks)
        multiply_whole_chunk(p, at.chunk, stages[s], rows_at.own, shared, outer_code, sums);
      else
        multiply_low_rank_chunk(p, at.chunk - whole_chunks, stages[s], rows_at.own, sums);
      if (ahead.tile != rows.tile) enter_tile(p, ahead.tile, rows);
      if (ahead.unit < end) load_chunk(p, rows, ahead.chunk, whole_chunks, stages[s]);
      ahead = advance(ahead, chunks);
      at = advance(at, chunks);
    }
  }
}
