// Tiles of rows in shared memory, and the two products over them that attention is made of:
//
//   dot_rows:    scores (rows x keys)    += left (rows x cols) tile (keys x cols)^T
//   add_product: out    (rows x columns) += weights (rows x keys) tile (keys x columns)
//
// 16-bit entries go through mma.sync m16n8k16; fp32 ones through FFMA, in the same layout, with
// each sum in the order of its terms. A warp owns 16 M rows; nothing of its sums is another warp's.
#pragma once
#include <type_traits>

#include "device.h"

namespace fastattn::cuda {

FASTATTN_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
FASTATTN_DEVICE int larger(int a, int b) { return a > b ? a : b; }
constexpr int smaller_of(int a, int b) { return a < b ? a : b; }

FASTATTN_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
FASTATTN_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

// ---- a warp's share of a (16 M x 8 N) matrix ----------------------------------------------------

// Lane 4 g + t holds the 2 M rows row_of(r), and of each the columns 8 n + 2 t and the next.
template <int M, int N>
struct Share {
  float x[M][N][4] = {};
  FASTATTN_DEVICE float& at(int r, int n, int c) { return x[r / 2][n][r % 2 * 2 + c]; }
};
FASTATTN_DEVICE int row_of(int r) { return r / 2 * 16 + r % 2 * 8 + lane_index() / 4; }
FASTATTN_DEVICE int col_of(int n, int c) { return 8 * n + lane_index() % 4 * 2 + c; }

// function(r, n, c, entry) for the entries of a share, those of one column after one another.
template <int M, int N, class Function>
FASTATTN_DEVICE void for_each(Share<M, N>& share, Function function) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) function(r, n, c, share.at(r, n, c));
}

// Over the four lanes that hold a row.
FASTATTN_DEVICE float row_max_of(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
FASTATTN_DEVICE float row_sum_of(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// ---- tiles --------------------------------------------------------------------------------------

struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(8) Float2 {
  float x, y;
};

// Rows of COLS entries (a power of two, 128 bytes or more) in chunks of 16 bytes. Chunk c of a row
// lies at c ^ (row % 8), so that eight rows of one column of chunks lie in eight sets of banks.
template <class T, int COLS>
struct Tile {
  static constexpr int kEntries = 16 / sizeof(T);  // of a chunk
  static constexpr int kChunks = COLS / kEntries;  // of a row
  T* data;

  FASTATTN_DEVICE T* chunk(int row, int c) const {
    return data + (row * kChunks + (c ^ (row % 8))) * kEntries;
  }
};

// Of a lane: the chunks 2 k + odd of the row `rows` below its own, where rows is a multiple of
// eight. Four addresses serve them all, what rows and k add being constants.
template <class T, int COLS>
struct Cursor {
  using Cut = Tile<T, COLS>;
  const T* at[4];

  FASTATTN_DEVICE Cursor(Cut tile, int row, int odd) {
#pragma unroll
    for (int k = 0; k < 4; ++k) at[k] = tile.chunk(row, 2 * k + odd);
  }
  FASTATTN_DEVICE const T* chunk(int rows, int k) const {
    return at[k % 4] + (rows * Cut::kChunks + k / 4 * 8) * Cut::kEntries;
  }
};

template <class T, int COLS>
constexpr int kRowBytes = COLS * static_cast<int>(sizeof(T));

// A chunk read entry by entry, where addresses are not multiples of 16.
template <class T>
FASTATTN_DEVICE void copy_entries(T* shared, const T* global, int entries) {
  struct alignas(16) Chunk {
    T entry[16 / sizeof(T)];
  } chunk;
#pragma unroll
  for (int e = 0; e < static_cast<int>(16 / sizeof(T)); ++e)
    chunk.entry[e] = e < entries ? load(global + e) : T{};
  store_shared(reinterpret_cast<Chunk*>(shared), chunk);
}

// Rows [0, ROWS) into a tile: row(r) is where a row lies, or null for zeros. Past cols are zeros.
// They are there after wait_copies and a barrier.
template <int ROWS, int THREADS, class T, int COLS, class Row>
FASTATTN_DEVICE void copy_rows(Tile<T, COLS> tile, int cols, bool aligned, Row row) {
  using Cut = Tile<T, COLS>;
  static_assert(ROWS * Cut::kChunks % THREADS == 0, "every thread copies the same number");
#pragma unroll 1  // unrolled, the addresses of all chunks would be kept in registers
  for (int turn = 0; turn < ROWS * Cut::kChunks / THREADS; ++turn) {
    const int index = turn * THREADS + static_cast<int>(threadIdx.x);
    const int r = index / Cut::kChunks, c = index % Cut::kChunks;
    const T* from = row(r);
    int entries = smaller(larger(cols - c * Cut::kEntries, 0), Cut::kEntries);
    if (from == nullptr) entries = 0;
    if (entries > 0) from += c * Cut::kEntries;
    if (aligned)
      copy_async(tile.chunk(r, c), from, entries * static_cast<int>(sizeof(T)));
    else
      copy_entries(tile.chunk(r, c), from, entries);
  }
}

// A warp's rows, factor(r) times a share, from the warp's first row of a tile on, which is free to
// be written; then to global memory, 16 bytes at a time where it is aligned. row(i): where row i of
// the warp goes, or null.
template <class T, int COLS, int M, class Factor, class Row>
FASTATTN_DEVICE void write_rows(
    Share<M, COLS / 8>& share, Tile<T, COLS> tile, int first, int cols, bool aligned, Factor factor,
    Row row) {
  using Cut = Tile<T, COLS>;
  struct alignas(2 * sizeof(T)) Pair {
    T entry[2];
  };
  struct alignas(16) Chunk {
    T entry[Cut::kEntries];
  };
  sync_warp();
#pragma unroll
  for (int r = 0; r < 2 * M; ++r)
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n) {
      const float f = factor(r);
      const Pair pair{from_float<T>(share.at(r, n, 0) * f), from_float<T>(share.at(r, n, 1) * f)};
      const int col = col_of(n, 0);
      T* chunk = tile.chunk(first + row_of(r), col / Cut::kEntries);
      store_shared(reinterpret_cast<Pair*>(chunk + col % Cut::kEntries), pair);
    }
  sync_warp();
#pragma unroll 1
  for (int index = lane_index(); index < 16 * M * Cut::kChunks; index += 32) {
    const int r = index / Cut::kChunks, c = index % Cut::kChunks;
    T* to = row(r);
    if (to == nullptr) continue;
    to += c * Cut::kEntries;
    const Chunk chunk = load_shared(reinterpret_cast<const Chunk*>(tile.chunk(first + r, c)));
    if (aligned && (c + 1) * Cut::kEntries <= cols) {
      store(reinterpret_cast<Chunk*>(to), chunk);
      continue;
    }
#pragma unroll
    for (int e = 0; e < Cut::kEntries; ++e)
      if (c * Cut::kEntries + e < cols) store(to + e, chunk.entry[e]);
  }
}

// ---- the left side of dot_rows: 16 M rows of a warp
// ----------------------------------------------

// Where registers are short, read again for each product.
template <class T, int COLS, int M>
struct InShared {
  Cursor<T, COLS> cursor;

  FASTATTN_DEVICE InShared(Tile<T, COLS> tile, int first)
      : cursor(tile, first + lane_index() % 16, lane_index() / 16) {}
  FASTATTN_DEVICE void fragment(int m, int k, uint32_t (&a)[4]) const {
    load_matrices(a, cursor.chunk(16 * m, k));
  }
};

template <int COLS, int M>
struct InShared<float, COLS, M> {
  Tile<float, COLS> tile;
  int first;  // row
};

template <class T, int COLS, int M>
struct InRegisters {
  uint32_t a[M][COLS / 16][4];

  FASTATTN_DEVICE explicit InRegisters(const InShared<T, COLS, M>& rows) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int k = 0; k < COLS / 16; ++k) rows.fragment(m, k, a[m][k]);
  }
  FASTATTN_DEVICE void fragment(int m, int k, uint32_t (&to)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = a[m][k][i];
  }
};

// ---- products -----------------------------------------------------------------------------------

template <class Left, class T, int COLS, int M, int N>
FASTATTN_DEVICE void dot_rows(Share<M, N>& scores, const Left& left, Tile<T, COLS> tile) {
  static_assert(N % 2 == 0, "two columns of eight at a time");
  const int lane = lane_index();
  const Cursor<T, COLS> cursor(tile, lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < COLS / 16; ++k) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) left.fragment(m, k, a[m]);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_matrices(b, cursor.chunk(8 * n, k));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add(scores.x[m][n], a[m], b[0], b[1], T{});
        multiply_add(scores.x[m][n + 1], a[m], b[2], b[3], T{});
      }
    }
  }
}

template <int COLS, int M, int N>
FASTATTN_DEVICE void dot_rows(
    Share<M, N>& scores, const InShared<float, COLS, M>& left, Tile<float, COLS> tile) {
#pragma unroll 2
  for (int k = 0; k < COLS / 4; ++k) {
    Float4 a[2 * M];
#pragma unroll
    for (int r = 0; r < 2 * M; ++r)
      a[r] =
          load_shared(reinterpret_cast<const Float4*>(left.tile.chunk(left.first + row_of(r), k)));
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Float4 b = load_shared(reinterpret_cast<const Float4*>(tile.chunk(col_of(n, c), k)));
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
          float& sum = scores.at(r, n, c);
          sum = fmaf(a[r].x, b.x, sum);
          sum = fmaf(a[r].y, b.y, sum);
          sum = fmaf(a[r].z, b.z, sum);
          sum = fmaf(a[r].w, b.w, sum);
        }
      }
  }
}

template <class T, int COLS, int M, int N>
FASTATTN_DEVICE void add_product(
    Share<M, COLS / 8>& out, Share<M, N>& weights, Tile<T, COLS> tile) {
  const Cursor<T, COLS> cursor(tile, lane_index() % 16, lane_index() / 16);
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    uint32_t a[M][4];  // what is a sum's layout is a factor's too
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&x)[4] = weights.x[m][2 * k + i / 2];
        a[m][i] = pack<T>(x[i % 2 * 2], x[i % 2 * 2 + 1]);
      }
#pragma unroll
    for (int n = 0; n < COLS / 8; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, cursor.chunk(16 * k, n / 2));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add(out.x[m][n], a[m], b[0], b[1], T{});
        multiply_add(out.x[m][n + 1], a[m], b[2], b[3], T{});
      }
    }
  }
}

template <int COLS, int M>
FASTATTN_DEVICE void add_row(
    Share<M, COLS / 8>& out, const float (&weights)[2 * M], Tile<float, COLS> tile, int row) {
#pragma unroll
  for (int n = 0; n < COLS / 8; ++n) {
    const int col = col_of(n, 0);
    const Float2 x =
        load_shared(reinterpret_cast<const Float2*>(tile.chunk(row, col / 4) + col % 4));
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
      out.at(r, n, 0) = fmaf(weights[r], x.x, out.at(r, n, 0));
      out.at(r, n, 1) = fmaf(weights[r], x.y, out.at(r, n, 1));
    }
  }
}
template <int COLS, int M, int N>
FASTATTN_DEVICE void add_product(
    Share<M, COLS / 8>& out, Share<M, N>& weights, Tile<float, COLS> tile) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll 1  // unrolled, loads far ahead would take all registers
    for (int holder = 0; holder < 4; ++holder)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float a[2 * M];  // a weight is held by one lane of its row's four
#pragma unroll
        for (int r = 0; r < 2 * M; ++r)
          a[r] = shuffle(weights.at(r, j, c), lane_index() / 4 * 4 + holder);
        add_row(out, a, tile, 8 * j + 2 * holder + c);
      }
}

}  // namespace fastattn::cuda
