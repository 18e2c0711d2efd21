// Attention backward. With P = exp(score - lse), dP = dropout(dO V^T) and delta = sum(dO * O) -
// dlse:
//   dS = P * (dP - delta);  dV = dropout(P)^T dO;  dK = scale dS^T Q;  dQ = scale dS K
//
// A task is a chunk of keys of one key/value head: it owns that chunk's dK and dV and walks all
// queries that see it. Its share of dQ is added in the order of the chunks: a counter for every
// block of queries says whose turn it is. So few heads feed many threads, no memory grows with Sq *
// Sk, and the sums have one order. Tasks are taken in order, hence the chunk that is waited for has
// always been taken; one that fails says so to those that wait.

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kChunkKeys = 256;  // dK, dV and fp32 K, V: 256 KB at D = 64

// A block of queries as the products want it: slots 0 and 1 of the scratch.
template <class Word>
struct BlockInputs {
  Word *queries, *douts;         // QT (words of D x W), dOT (likewise), group after group
  Word *query_rows, *dout_rows;  // (words of rows x padded D), (words of rows x padded Dv)
  float lse[kBlockRows], lse_low[kBlockRows], delta[kBlockRows];
  float* few;  // rows x D, where rows are few: slot 7
};

template <class Word>
static void read_block(
    const AttentionArgs& args, const AttentionGradients& grads, const Sequence& s,
    const Block& block, const Group* groups, int count, bool rows, BlockInputs<Word>* in) {
  const int64_t lanes = kBlockRows;
  in->queries = scratch<Word>(0, lanes * (args.D + args.Dv));
  in->douts = in->queries + lanes * args.D;
  pack_block(block, groups, count, args.query, s, args.D, in->queries);
  pack_block(block, groups, count, grads.dout, s, args.Dv, in->douts);
  if (rows) {
    in->query_rows = scratch<Word>(1, lanes * (padded(args.D) + padded(args.Dv)));
    in->dout_rows = in->query_rows + lanes * padded(args.D);
    read_block_rows(block, args.query, s, args.D, in->query_rows);
    read_block_rows(block, grads.dout, s, args.Dv, in->dout_rows);
  }
  in->few = has_few_rows(args, s) ? thread_scratch(7, kFewRows * args.D) : nullptr;
  if (in->few != nullptr) read_block_rows(block, args.query, s, args.D, in->few);
  for (int r = 0; r < block.vectors * kLanes; ++r) {
    // P is 0 by an lse of +inf, whatever the scores are, in lanes that hold no row and in rows that
    // see nothing
    in->lse[r] = kInf;
    in->lse_low[r] = in->delta[r] = 0.f;
    if (r >= block.rows) continue;
    const int64_t at =
        s.b * args.lse_batch + block.head[r] * args.lse_head + s.query_start + block.query[r];
    if (args.lse[at] == -kInf) continue;
    // lse in two floats: rounded to one, a logit of 3500 would put an error of 1e-4 into P
    in->lse[r] = args.lse[at];
    in->lse_low[r] = args.lse_low[at];
    in->delta[r] = grads.delta[at];
  }
}

// What one tile of scores gives: slot 2 of the scratch, kTileKeys x W each.
struct TileGradients {
  float *weights, *dscores;  // dropout(P), and dS before softcap's derivative
  float *cap_slope, *kept;
  float* over_keys;  // for pairs of dS
};

static TileGradients tile_gradients() {
  constexpr int64_t size = kTileKeys * kGroupVectors * kLanes;
  float* start = thread_scratch(2, 5 * size);
  return {start, start + size, start + 2 * size, start + 3 * size, start + 4 * size};
}

// Rows of pairs as the entries that they hold: where rows are few, D is even.
FA_INLINE Tile<float> entries_of(Tile<float> keys) { return keys; }
FA_INLINE Tile<bf16> entries_of(Tile<bf16x2> keys) {
  return {(const bf16*)keys.data, 2 * keys.stride};
}

template <int NV, class Word>
static __attribute__((noinline)) void grade_tile(
    const AttentionArgs& args, const Block& block, const Group& group, const Sequence& s,
    const BlockInputs<Word>& in, const Tile<Word>& keys, const Tile<Word>& values, int64_t key,
    int64_t n, const TileGradients& out) {
  Vec ignored[NV] = {};
  const int64_t lane = group.lane, entries = n * NV * kLanes;
  const int64_t D = words<Word>(args.D), Dv = words<Word>(args.Dv);
  // the forward's scores bit for bit: a rounding elsewhere is five times the error at logits of 100
  if (in.few != nullptr) {
    float* scores = out.kept;  // which dropout fills later
    score_few(entries_of(keys), n, in.few, block.rows, args.D, args.scale, scores);
    turn_few(scores, block.rows, n, out.weights);
  } else {
    dot_rows<NV>(
        keys, n, in.queries + lane * D, D, args.scale, out.weights, ignored,
        ScoresAhead{args, block, group, s, key, n});
  }
  dot_rows<NV>(values, n, in.douts + lane * Dv, Dv, 1.f, out.dscores, ignored);
  if (is_featured(args)) modify_scores(args, block, group, s, key, n, out.weights, out.cap_slope);
  if (key < group.all.begin || key + n > group.all.end)
    hide_scores(block, group, key, n, out.weights);
  if (args.dropout) {
    for (int64_t e = 0; e < entries; ++e) out.kept[e] = 1.f;
    drop_weights(args, block, group, s, key, n, out.kept);
    // rounded here, and not inside of dP - delta: delta is a sum of these
    for (int64_t e = 0; e < entries; e += kLanes)
      store(out.dscores + e, load(out.dscores + e) * load(out.kept + e));
  }
  Vec lse[NV], lse_low[NV], delta[NV];
  for (int v = 0; v < NV; ++v) {
    lse[v] = load(in.lse + lane + v * kLanes);
    lse_low[v] = load(in.lse_low + lane + v * kLanes);
    delta[v] = load(in.delta + lane + v * kLanes);
  }
  for (int64_t k = 0; k < n; ++k)
    FA_FOR (v, NV) {
      const int64_t at = (k * NV + v) * kLanes;
      const Vec p = exp(load(out.weights + at) - lse[v] - lse_low[v]);
      const Vec kept = args.dropout ? load(out.kept + at) : splat(1.f);
      store(out.weights + at, p * kept);
      store(out.dscores + at, p * (load(out.dscores + at) - delta[v]));
    }
}

template <class Word>
static void grade_tile_any(
    const AttentionArgs& args, const Block& block, const Group& group, const Sequence& s,
    const BlockInputs<Word>& in, const Tile<Word>& keys, const Tile<Word>& values, int64_t key,
    int64_t n, const TileGradients& out) {
  switch (group.vectors) {
    case 3: return grade_tile<3>(args, block, group, s, in, keys, values, key, n, out);
    case 2: return grade_tile<2>(args, block, group, s, in, keys, values, key, n, out);
    default: return grade_tile<1>(args, block, group, s, in, keys, values, key, n, out);
  }
}

template <int NV, class Word>
static __attribute__((noinline)) void add_dquery(
    const Tile<Word>& keys, int64_t n, int64_t D, const Word* dscores, float* dquery) {
  Vec one[NV];
  for (int v = 0; v < NV; ++v) one[v] = splat(1.f);
  add_rows<NV>(keys, words<Word>(n), D, dscores, dquery, one);
}

template <class Word>
static void add_dquery_any(
    const Group& group, const Tile<Word>& keys, int64_t n, int64_t D, const Word* dscores,
    float* dquery) {
  switch (group.vectors) {
    case 3: return add_dquery<3>(keys, n, D, dscores, dquery);
    case 2: return add_dquery<2>(keys, n, D, dscores, dquery);
    default: return add_dquery<1>(keys, n, D, dscores, dquery);
  }
}

// sum of dS * -|distance| over the tile: a slope's gradient.
static float slope_gradient(
    const Block& block, const Group& group, const Sequence& s, int64_t key, int64_t n,
    const float* dscores) {
  Vec sum = {};
  for (int v = 0; v < group.vectors; ++v) {
    Vec middle;
    for (int l = 0; l < kLanes; ++l)
      middle[l] = (float)(block.query[group.lane + v * kLanes + l] + s.diagonal);
    for (int64_t k = 0; k < n; ++k) {
      const Vec distance = middle - splat((float)(key + k));
      sum -= load(dscores + (k * group.vectors + v) * kLanes) *
             (distance < Vec{} ? -distance : distance);
    }
  }
  return reduce_sum(sum);
}

// ---- dQ, dK, dV: a task is a chunk of keys ----------------------------------------------------

template <class Word>
struct Chunk {
  int64_t index, start, keys, readable;  // readable: the rest lies past key_lengths
  Tile<Word> k, v, k_over_keys;          // slot 3 of the scratch, where they are copies
  float *dk, *dv;                        // slot 4
};

// Keys of a sequence that have a gradient: those past key_lengths too.
FA_INLINE int64_t key_rows(const AttentionArgs& args, const Sequence& s) {
  return args.cu_seqlens_k != nullptr ? s.Sk : args.Sk;
}
// Queries of all earlier sequences.
FA_INLINE int64_t first_query(const AttentionArgs& args, int64_t b) {
  return args.cu_seqlens_q != nullptr ? args.cu_seqlens_q[b] : b * args.Sq;
}

// Where every query and key has a bias of its own, its gradient falls off in the same pass: a task
// then takes its chunk in all sequences that share the bias, one after another, and sums what they
// give. Else, or where such tasks would be few or their sums large, it has a pass of its own.
struct BiasInPass {
  int64_t sequences = 0;  // that share a bias; 0: not in this pass
  int64_t chunks = 0, heads = 0;
  Blocks cut{0};

  BiasInPass(const AttentionArgs& args, const AttentionGradients& grads) : cut(args.Sq) {
    const Scores& out = grads.dbias;
    if (out.data == nullptr || out.col != 1 || out.size[1] != args.Hq || out.size[2] != args.Sq ||
        out.size[3] != args.Sk)
      return;
    chunks = cuts(args.Sk, kChunkKeys);
    heads = args.Hq / args.Hkv;
    const int64_t sharing = out.size[0] == 1 ? args.B : 1;
    if (sharing > 0 && args.B / sharing * args.Hkv * chunks >= 16 && heads * args.Sq <= 8192)
      sequences = sharing;
  }
  int64_t tasks(const AttentionArgs& args) const { return args.B / sequences * args.Hkv * chunks; }
  int64_t entries() const { return heads * cut.count * kChunkKeys * kBlockRows; }
  // The sums of a block: (kChunkKeys, kBlockRows).
  float* of(float* sums, int64_t head, int64_t block) const {
    return sums + (head % heads * cut.count + block) * kChunkKeys * kBlockRows;
  }
};

// Some heads of some sequences whose dQ is summed at one time, in fp32: where dQ is fp32 itself
// these are all; else few enough that 64k queries of many heads do not all have fp32 sums. Rows are
// counted a sequence after another, and there a head after another.
struct Round {
  float* sums = nullptr;  // null: dQ is fp32, and its own sum
  int64_t first_row = 0;
};

template <class Word>
struct Backward {
  const AttentionArgs& args;
  const AttentionGradients& grads;
  const Pieces &chunks, &blocks;  // of keys, of queries
  std::atomic<int32_t>* turns;    // (Hq, blocks), zero: chunks that have added to dquery
  double* slopes;                 // (Hq, chunks), zero, or null: a chunk's share
  std::atomic<bool>* failed;
  Round round;
  BiasInPass bias;

  int64_t tasks() const {
    return bias.sequences > 0 ? bias.tasks(args) : chunks.total() * args.Hkv;
  }

  void run(int64_t task) const {
    if (*failed) return;
    try {
      run_task(task);
    } catch (...) {
      *failed = true;
      throw;
    }
  }

  void run_task(int64_t task) const {
    if (bias.sequences > 0) return run_with_bias(task);
    const int64_t b = chunks.sequence_of(task / args.Hkv);
    const int64_t place = task - chunks.begin(b) * args.Hkv;
    run_chunk(b, place / chunks.of(b), place % chunks.of(b), nullptr);
  }

  void run_with_bias(int64_t task) const {
    const int64_t index = task % bias.chunks, kv_head = task / bias.chunks % args.Hkv;
    const int64_t first = task / bias.chunks / args.Hkv * bias.sequences;
    float* sums = thread_scratch(6, bias.entries());
    std::memset(sums, 0, bias.entries() * sizeof(float));
    for (int64_t b = first; b < first + bias.sequences; ++b) run_chunk(b, kv_head, index, sums);
    for (int64_t head = kv_head * bias.heads; head < (kv_head + 1) * bias.heads; ++head)
      for (int64_t block = 0; block < bias.cut.count; ++block)
        write_bias(first, head, block, index * kChunkKeys, bias.of(sums, head, block));
  }

  void write_bias(int64_t b, int64_t head, int64_t block, int64_t key, const float* sums) const {
    const Scores& out = grads.dbias;
    const int64_t first = block * bias.cut.rows_each;
    const int64_t rows = smaller(bias.cut.rows_each, args.Sq - first);
    float ones[kLanes];
    store(ones, splat(1.f));
    for (int64_t r = 0; r < rows; r += kLanes) {
      void* row[kLanes] = {};
      for (int64_t l = 0; l < smaller(kLanes, rows - r); ++l)
        row[l] = offset_by(
            out.data, out.dtype, out.at(out.size[0] == 1 ? 0 : b, head, first + r + l) + key);
      unpack(out.dtype, sums + r, kBlockRows, smaller(kChunkKeys, args.Sk - key), ones, row);
    }
  }

  void run_chunk(int64_t b, int64_t kv_head, int64_t index, float* bias_sums) const {
    const int64_t group = args.Hq / args.Hkv;
    const Sequence s = sequence(args, b);
    Chunk<Word> chunk{index, index * kChunkKeys};
    chunk.keys = smaller(kChunkKeys, key_rows(args, s) - chunk.start);
    chunk.readable = larger(0, smaller(chunk.keys, s.Sk - chunk.start));
    const int64_t D = padded(args.D), Dv = padded(args.Dv);
    chunk.dk = thread_scratch(4, kChunkKeys * (D + Dv));
    chunk.dv = chunk.dk + kChunkKeys * D;
    std::memset(chunk.dk, 0, kChunkKeys * (D + Dv) * sizeof(float));
    if (chunk.readable > 0) {
      read_chunk(s, kv_head, &chunk);
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        walk_queries(s, head, chunk, bias_sums);
    }
    write_rows(grads.dkey, s, kv_head, chunk, chunk.dk, args.D, args.scale);
    write_rows(grads.dvalue, s, kv_head, chunk, chunk.dv, args.Dv, 1.f);
  }

  void read_chunk(const Sequence& s, int64_t head, Chunk<Word>* chunk) const {
    const int64_t start = chunk->start, n = chunk->readable;
    Word* buffer = scratch<Word>(3, kChunkKeys * (2 * args.D + args.Dv));
    chunk->k = read_keys(args, args.key, s, head, start, n, args.D, buffer);
    buffer += kChunkKeys * args.D;
    chunk->k_over_keys =
        read_over_keys(args, args.key, s, head, start, n, args.D, buffer, &chunk->k);
    buffer += kChunkKeys * args.D;
    chunk->v = read_keys(args, args.value, s, head, start, n, args.Dv, buffer);
  }

  void walk_queries(
      const Sequence& s, int64_t head, const Chunk<Word>& chunk, float* bias_sums) const {
    const Blocks cut(s.Sq);
    double slope = 0;
    for (int64_t index = 0; index < cut.count; ++index) {
      Block block;
      Group groups[kBlockVectors];
      set_block(args, s, head, cut, index, &block);
      const Range seen{
          larger(block.keys.begin, chunk.start),
          smaller(block.keys.end, chunk.start + chunk.readable)};
      if (seen.empty()) continue;
      const int count = split_groups(block, groups);
      BlockInputs<Word> in;
      const bool rows = grads.dkey.data != nullptr || grads.dvalue.data != nullptr;
      read_block(args, grads, s, block, groups, count, rows, &in);
      float* dquery = thread_scratch(5, kBlockRows * args.D);
      std::memset(dquery, 0, block.vectors * kLanes * args.D * sizeof(float));
      float* dbias = bias_sums == nullptr ? nullptr : bias.of(bias_sums, head, index);
      for (const Group* group = groups; group != groups + count; ++group)
        slope += walk_tiles(s, block, *group, in, chunk, dquery, dbias);
      if (grads.dquery.data == nullptr) continue;
      std::atomic<int32_t>& turn = turns[head * blocks.total() + blocks.begin(s.b) + index];
      if (!take_turn(turn, (int32_t)(chunk.index - block.keys.begin / kChunkKeys))) return;
      add_to_dquery(s, block, groups, count, chunk.index, dquery);
      turn.fetch_add(1, std::memory_order_release);
    }
    if (slopes != nullptr) slopes[head * chunks.total() + chunks.begin(s.b) + chunk.index] = slope;
  }

  double walk_tiles(
      const Sequence& s, const Block& block, const Group& group, const BlockInputs<Word>& in,
      const Chunk<Word>& chunk, float* dquery, float* dbias) const {
    const int64_t begin = chunk.start + skipped<Word>(chunk.start, group.some.begin);
    const int64_t end = smaller(group.some.end, chunk.start + chunk.readable);
    const int64_t W = group.vectors * kLanes;
    const TileGradients tile = tile_gradients();
    double slope = 0;
    for (int64_t key = begin; key < end; key += kTileKeys) {
      const int64_t n = smaller(kTileKeys, end - key), from = key - chunk.start;
      const Tile<Word> keys{chunk.k.data + from * chunk.k.stride, chunk.k.stride};
      const Tile<Word> values{chunk.v.data + from * chunk.v.stride, chunk.v.stride};
      grade_tile_any(args, block, group, s, in, keys, values, key, n, tile);
      if (slopes != nullptr) slope += slope_gradient(block, group, s, key, n, tile.dscores);
      if (dbias != nullptr) add_bias(group, n, tile.dscores, dbias + from * kBlockRows);
      if (args.softcap > 0)
        for (int64_t e = 0; e < n * W; e += kLanes)
          store(tile.dscores + e, load(tile.dscores + e) * load(tile.cap_slope + e));
      add_products(block, group, in, chunk, from, n, tile, dquery);
    }
    return slope;
  }

  static void add_bias(const Group& group, int64_t n, const float* dscores, float* sums) {
    for (int64_t k = 0; k < n; ++k)
      for (int v = 0; v < group.vectors; ++v) {
        float* at = sums + k * kBlockRows + group.lane + v * kLanes;
        store(at, load(at) + load(dscores + (k * group.vectors + v) * kLanes));
      }
  }

  // dQ += K^T dS^T, dV += P^T dO, dK += dS^T Q of a tile; of pairs, what it held is lost.
  void add_products(
      const Block& block, const Group& group, const BlockInputs<Word>& in, const Chunk<Word>& chunk,
      int64_t from, int64_t n, const TileGradients& tile, float* dquery) const {
    const int64_t D = padded(args.D), Dv = padded(args.Dv), W = group.vectors * kLanes;
    const int64_t rows = words<Word>(smaller(W, block.rows - group.lane));
    const int64_t first = group.lane / kPerWord<Word>;
    if (grads.dquery.data != nullptr) {
      const int64_t stride = chunk.k_over_keys.stride;
      const Tile<Word> keys{chunk.k_over_keys.data + from / kPerWord<Word> * stride, stride};
      const Word* dscores = over_keys(tile.dscores, n, W, (Word*)tile.over_keys);
      add_dquery_any(group, keys, n, args.D, dscores, dquery + group.lane * args.D);
    }
    if (grads.dvalue.data != nullptr) {
      const Word* weights = over_queries(tile.weights, n, W, (Word*)tile.weights);
      add_outer(weights, W, n, in.dout_rows + first * Dv, rows, Dv, chunk.dv + from * Dv);
    }
    if (grads.dkey.data != nullptr) {
      const Word* dscores = over_queries(tile.dscores, n, W, (Word*)tile.dscores);
      add_outer(dscores, W, n, in.query_rows + first * D, rows, D, chunk.dk + from * D);
    }
  }

  // False where the chunk that is waited for has failed.
  bool take_turn(const std::atomic<int32_t>& turn, int32_t mine) const {
    for (int spins = 0; turn.load(std::memory_order_acquire) != mine; ++spins) {
      if (*failed) return false;
      if (spins > 1000) std::this_thread::yield();
    }
    return true;
  }

  // Where dQ of a sequence is summed.
  Heads dquery_sums(const Sequence& s) const {
    if (round.sums == nullptr) return grads.dquery;
    Heads sums;
    sums.head = s.Sq * args.D;
    sums.row = args.D;
    const int64_t before = first_query(args, s.b) * args.Hq - round.first_row - s.query_start;
    sums.data = round.sums + before * args.D;
    return sums;
  }

  void add_to_dquery(
      const Sequence& s, const Block& block, const Group* groups, int count, int64_t chunk,
      const float* dquery) const {
    const Heads sums = dquery_sums(s);
    const bool narrow = round.sums != nullptr;
    const bool first = chunk == block.keys.begin / kChunkKeys;
    const bool last = chunk == (block.keys.end - 1) / kChunkKeys;
    for (int r = 0; narrow && first && r < block.rows; ++r)
      std::memset(sum_row(sums, s, block, r), 0, args.D * sizeof(float));
    for (const Group* group = groups; group != groups + count; ++group)
      for (int v = 0; v < group->vectors; ++v) {
        void* rows[kLanes];
        block_rows(block, *group, v, sums, s, rows);
        unpack_add(
            dquery + group->lane * args.D + v * kLanes, group->vectors * kLanes, args.D, args.scale,
            rows);
      }
    for (int r = 0; narrow && last && r < block.rows; ++r) {
      const Heads& out = grads.dquery;
      const int64_t at = out.at(s.b, block.head[r], s.query_start + block.query[r]);
      FASTATTN_DISPATCH(
          out.dtype, narrow_row, sum_row(sums, s, block, r), args.D, 1.f,
          offset_by(out.data, out.dtype, at));
    }
  }

  static float* sum_row(const Heads& sums, const Sequence& s, const Block& block, int r) {
    return (float*)sums.data + sums.at(s.b, block.head[r], s.query_start + block.query[r]);
  }

  void write_rows(
      const Heads& out, const Sequence& s, int64_t head, const Chunk<Word>& chunk,
      const float* sums, int64_t cols, float factor) const {
    if (out.data == nullptr) return;
    for (int64_t k = 0; k < chunk.keys; ++k) {
      const int64_t at = out.at(s.b, head, s.key_start + chunk.start + k);
      FASTATTN_DISPATCH(
          out.dtype, narrow_row, sums + k * padded(cols), cols, factor,
          offset_by(out.data, out.dtype, at));
    }
  }
};

// ---- tiles of one block of queries, without dQ, dK and dV --------------------------------------

// body(group, key, n, dscores) for every tile of `keys` that a group of the block sees.
template <class Word, class Body>
static void for_graded_tiles(
    const AttentionArgs& args, const Sequence& s, int64_t head, const Block& block,
    const Group* groups, int count, const BlockInputs<Word>& in, Range keys, Body body) {
  const TileGradients tile = tile_gradients();
  Word* buffer = scratch<Word>(3, kTileKeys * (args.D + args.Dv));
  const int64_t kv_head = head / (args.Hq / args.Hkv);
  for (int64_t key = keys.begin; key < keys.end; key += kTileKeys) {
    const int64_t n = smaller(kTileKeys, keys.end - key);
    const Tile<Word> k = read_keys(args, args.key, s, kv_head, key, n, args.D, buffer);
    const Tile<Word> v =
        read_keys(args, args.value, s, kv_head, key, n, args.Dv, buffer + kTileKeys * args.D);
    for (const Group* group = groups; group != groups + count; ++group) {
      if (key >= group->some.end || key + n <= group->some.begin) continue;
      grade_tile_any(args, block, *group, s, in, k, v, key, n, tile);
      body(*group, key, n, tile.dscores);
    }
  }
}

// ---- the bias's gradient: a pass of its own, a task is a tile of the bias ---------------------

// dS of every sequence, head, query and key that a tile of the bias reaches, in order; memory is
// the tile's. Where rows or columns of the bias are one for all, its tiles are few and small: then
// a task is one head's part of a tile, and the parts are added in order. Sums are double from a
// tile of scores on: a fp32 chain over 2048 queries of 16 heads lost up to 4 times the allowance.
template <class Word>
struct BiasBackward {
  const AttentionArgs& args;
  const AttentionGradients& grads;
  Blocks cut;
  bool all_rows, all_cols;
  int64_t row_tiles, col_tiles, batches, heads;  // batches, heads: of one tile
  int64_t parts, entries;                        // of a tile
  double* sums;                                  // (tasks, entries), where there are parts

  BiasBackward(const AttentionArgs& args, const AttentionGradients& grads)
      : args(args), grads(grads), cut(args.Sq) {
    const int64_t* size = grads.dbias.size;
    all_rows = size[2] == 1;
    all_cols = size[3] == 1;
    row_tiles = all_rows ? 1 : cut.count;
    col_tiles = all_cols ? 1 : cuts(args.Sk, kChunkKeys);
    batches = size[0] == 1 ? args.B : 1;
    heads = size[1] == 1 ? args.Hq : 1;
    parts = all_rows || all_cols ? larger(1, batches * heads) : 1;
    entries = (all_cols ? 1 : kChunkKeys) * (all_rows ? 1 : kBlockRows);
    sums = (double*)thread_scratch(10, parts > 1 ? 2 * tasks() * entries : 0);
  }
  int64_t tiles() const {
    return grads.dbias.size[0] * grads.dbias.size[1] * row_tiles * col_tiles;
  }
  int64_t tasks() const { return tiles() * parts; }

  struct Where {
    int64_t batch, head, row;
    Range cols;
  };
  Where where(int64_t tile) const {
    const int64_t col = tile % col_tiles, heads = grads.dbias.size[1];
    const Range cols =
        all_cols ? Range{0, args.Sk} : Range{col * kChunkKeys, (col + 1) * kChunkKeys};
    return {
        tile / col_tiles / row_tiles / heads, tile / col_tiles / row_tiles % heads,
        tile / col_tiles % row_tiles, cols};
  }

  void run(int64_t task) const {
    const Where at = where(task / parts);
    double* sum = parts > 1 ? sums + task * entries : (double*)thread_scratch(6, 2 * entries);
    std::memset(sum, 0, entries * sizeof(double));
    for (int64_t part = task % parts; part < batches * heads; part += parts) {
      const Sequence s = sequence(args, at.batch + part / heads);
      for (int64_t index = at.row; index < (all_rows ? cut.count : at.row + 1); ++index)
        add_block(s, at.head + part % heads, index, at.cols, sum);
    }
    if (parts == 1) write(at, sum);
  }

  void join(int64_t tile) const {
    double* sum = sums + tile * parts * entries;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t e = 0; e < entries; ++e) sum[e] += sum[part * entries + e];
    write(where(tile), sum);
  }

  void add_block(const Sequence& s, int64_t head, int64_t index, Range cols, double* sum) const {
    Block block;
    Group groups[kBlockVectors];
    set_block(args, s, head, cut, index, &block);
    const Range seen{larger(block.keys.begin, cols.begin), smaller(block.keys.end, cols.end)};
    if (seen.empty()) return;
    const int count = split_groups(block, groups);
    BlockInputs<Word> in;
    read_block(args, grads, s, block, groups, count, false, &in);
    for_graded_tiles(
        args, s, head, block, groups, count, in, seen,
        [&](const Group& group, int64_t key, int64_t n, const float* dscores) {
          add_tile_sums(
              group, n, dscores,
              sum + (all_cols ? 0 : key - cols.begin) * (all_rows ? 1 : kBlockRows));
        });
  }

  void add_tile_sums(const Group& group, int64_t n, const float* dscores, double* sum) const {
    for (int v = 0; v < group.vectors; ++v) {
      double* at = sum + (all_rows ? 0 : group.lane + v * kLanes);
      Vec columns = {};
      for (int64_t k = 0; k < n; ++k) {
        const Vec ds = load(dscores + (k * group.vectors + v) * kLanes);
        if (all_cols)
          columns += ds;
        else
          add_lanes(ds, at + k * (all_rows ? 1 : kBlockRows));
      }
      if (all_cols) add_lanes(columns, at);
    }
  }
  void add_lanes(Vec x, double* at) const {
    if (all_rows)
      *at += reduce_sum(x);
    else {
      float lane[kLanes];
      store(lane, x);
      for (int l = 0; l < kLanes; ++l) at[l] += lane[l];
    }
  }

  void write(const Where& at, const double* sum) const {
    const Scores& out = grads.dbias;
    const int64_t lanes = all_rows ? 1 : kBlockRows, first = at.row * cut.rows_each;
    const int64_t rows = all_rows ? 1 : smaller(cut.rows_each, args.Sq - first);
    const int64_t keys = all_cols ? 1 : smaller(at.cols.end, args.Sk) - at.cols.begin;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < keys; ++k) {
        const int64_t entry = out.at(at.batch, at.head, all_rows ? 0 : first + r) +
                              (all_cols ? 0 : at.cols.begin + k) * out.col;
        FASTATTN_DISPATCH(
            out.dtype, write_entry, (float)sum[k * lanes + r],
            offset_by(out.data, out.dtype, entry));
      }
  }

  template <class T>
  static void write_entry(float x, void* out) {
    from_float(x, (T*)out);
  }
};

// ---- the whole -------------------------------------------------------------------------------

// delta = sum(dO * O) - dlse; the binding has put -dlse there. With dropout, rows of one key are
// DroppedDelta's. Rows stand in lanes, so that the terms of a row are added one after another,
// as those of dP are: where one key has all the weight, dP - delta is exactly 0, as it is in naive
// PyTorch.
template <class Word>
static void attention_delta(const AttentionArgs& args, const AttentionGradients& grads) {
  parallel_tasks(args.B * args.Hq, [&](int64_t task) {
    const Sequence s = sequence(args, task / args.Hq);
    const int64_t head = task % args.Hq;
    const int64_t terms = words<Word>(args.Dv);
    Word* outs = scratch<Word>(0, 2 * terms * kLanes);
    Word* douts = outs + terms * kLanes;
    for (int64_t first = 0; first < s.Sq; first += kLanes) {
      const int64_t n = smaller(kLanes, s.Sq - first);
      void *out_rows[kLanes] = {}, *dout_rows[kLanes] = {};
      for (int64_t l = 0; l < n; ++l) {
        const int64_t i = s.query_start + first + l;
        out_rows[l] = offset_by(args.out.data, args.out.dtype, args.out.at(s.b, head, i));
        dout_rows[l] = offset_by(grads.dout.data, grads.dout.dtype, grads.dout.at(s.b, head, i));
      }
      pack(args.out.dtype, out_rows, args.Dv, outs, kLanes);
      pack(grads.dout.dtype, dout_rows, args.Dv, douts, kLanes);
      Vec sum = {};
      for (int64_t d = 0; d < terms; ++d)
        sum = fma(load(outs + d * kLanes), load(douts + d * kLanes), sum);
      const int64_t at = s.b * args.lse_batch + head * args.lse_head + s.query_start + first;
      if (args.dropout) sum = load_first(args.lse_low + at, n) == Vec{} ? Vec{} : sum;
      store_first(grads.delta + at, load_first(grads.delta + at, n) + sum, n);
    }
  });
}

// With dropout the same as sum(P * dP), in rows where one key has all the weight. There dS is 0,
// and out, rounded after its scaling by 1 / (1 - p), would leave it a rounding of dP. The sum of
// such a row is 1, so its lse is a score and has no low part; elsewhere one of 2^24 rows has none.
// In all rows for the gradient of a slope: there the sum of dS over keys, 0 but for delta's error,
// counts by the distance (up to 2.4 times the allowance).
template <class Word>
struct DroppedDelta {
  const AttentionArgs& args;
  const AttentionGradients& grads;
  const Pieces& blocks;

  void run(int64_t task) const {
    const int64_t b = blocks.sequence_of(task / args.Hq);
    const int64_t place = task - blocks.begin(b) * args.Hq, head = place / blocks.of(b);
    const Sequence s = sequence(args, b);
    Block block;
    Group groups[kBlockVectors];
    set_block(args, s, head, Blocks(s.Sq), place % blocks.of(b), &block);
    const int64_t row = s.b * args.lse_batch + head * args.lse_head + s.query_start + block.first;
    if (block.keys.empty() || !any_precise(row, block.rows)) return;
    const int count = split_groups(block, groups);
    BlockInputs<Word> in;
    read_block(args, grads, s, block, groups, count, false, &in);
    std::memset(in.delta, 0, sizeof in.delta);
    float sums[kBlockRows] = {};
    for_graded_tiles(
        args, s, head, block, groups, count, in, block.keys,
        [&](const Group& group, int64_t, int64_t n, const float* dscores) {
          add_over_keys(group, n, dscores, sums + group.lane);
        });
    for (int r = 0; r < block.rows; ++r)
      if (is_precise(row + r)) grads.delta[row + r] += sums[r];
  }

  static bool all_rows(const AttentionGradients& grads) { return grads.slope_sums != nullptr; }
  bool is_precise(int64_t row) const { return all_rows(grads) || args.lse_low[row] == 0.f; }
  bool any_precise(int64_t row, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r)
      if (is_precise(row + r)) return true;
    return false;
  }

  static void add_over_keys(const Group& group, int64_t n, const float* dscores, float* sums) {
    for (int v = 0; v < group.vectors; ++v) {
      Vec sum = {};
      for (int64_t k = 0; k < n; ++k) sum += load(dscores + (k * group.vectors + v) * kLanes);
      store(sums + v * kLanes, load(sums + v * kLanes) + sum);
    }
  }
};

// A round ends with the head that gives it this many queries (32 MB of sums at D = 64) and tasks.
constexpr int64_t kRoundRows = 1 << 17, kRoundTasks = 64;

// dQ, dK and dV, in rounds; the tasks of a head and of a round are neighbours.
template <class Word>
static void run_rounds(const AttentionArgs& args, Backward<Word> backward) {
  const Heads& dquery = backward.grads.dquery;
  const bool narrow = dquery.data != nullptr && dquery.dtype != Dtype::f32;
  const int64_t group = args.Hq / args.Hkv;
  int64_t first_task = 0, task = 0, first_row = 0, row = 0;
  Memory sums;
  const auto finish = [&] {
    if (narrow) backward.round = {sums.reserve((row - first_row) * args.D), first_row};
    parallel_tasks(task - first_task, [&](int64_t t) { backward.run(first_task + t); });
    first_task = task;
    first_row = row;
  };
  if (!narrow || backward.bias.sequences > 0) {
    task = backward.tasks();
    row = args.B * args.Hq * args.Sq;
    return finish();
  }
  for (int64_t b = 0; b < args.B; ++b)
    for (int64_t head = 0; head < args.Hkv; ++head) {
      task += backward.chunks.of(b);
      row += group * sequence(args, b).Sq;
      if (row - first_row >= kRoundRows && task - first_task >= kRoundTasks) finish();
    }
  finish();
}

template <class Word>
static void attention_bwd_in(const AttentionArgs& args, const AttentionGradients& grads) {
  int64_t* ends = (int64_t*)thread_scratch(9, 4 * args.B);
  const Pieces chunks(
      args, ends, [&](const Sequence& s) { return cuts(key_rows(args, s), kChunkKeys); });
  const Pieces blocks(args, ends + args.B, [](const Sequence& s) { return Blocks(s.Sq).count; });
  if (!args.dropout || !DroppedDelta<Word>::all_rows(grads)) attention_delta<Word>(args, grads);
  if (args.dropout) {
    const DroppedDelta<Word> delta{args, grads, blocks};
    parallel_tasks(blocks.total() * args.Hq, [&](int64_t task) { delta.run(task); });
  }
  std::atomic<bool> failed{false};
  const BiasInPass in_pass(args, grads);
  Backward<Word> backward{args, grads, chunks, blocks, nullptr, nullptr, &failed, {}, in_pass};
  backward.turns = (std::atomic<int32_t>*)thread_scratch(10, args.Hq * blocks.total());
  for (int64_t i = 0; i < args.Hq * blocks.total(); ++i) backward.turns[i] = 0;
  if (grads.slope_sums != nullptr) {
    backward.slopes = (double*)thread_scratch(11, 2 * args.Hq * chunks.total());
    std::memset(backward.slopes, 0, args.Hq * chunks.total() * sizeof(double));
  }
  if (grads.dquery.data != nullptr || grads.dkey.data != nullptr || grads.dvalue.data != nullptr ||
      grads.slope_sums != nullptr || in_pass.sequences > 0)
    run_rounds(args, backward);
  if (grads.slope_sums != nullptr)
    for (int64_t b = 0; b < args.B; ++b)
      for (int64_t h = 0; h < args.Hq; ++h)
        for (int64_t c = chunks.begin(b); c < chunks.ends[b]; ++c)
          grads.slope_sums[b * args.Hq + h] += backward.slopes[h * chunks.total() + c];
  if (grads.dbias.data == nullptr || in_pass.sequences > 0) return;
  const BiasBackward<Word> bias(args, grads);
  parallel_tasks(bias.tasks(), [&](int64_t task) { bias.run(task); });
  if (bias.parts > 1) parallel_tasks(bias.tiles(), [&](int64_t tile) { bias.join(tile); });
}

static void attention_bwd(const AttentionArgs& args, const AttentionGradients& grads) {
  if (in_pairs(args.query.dtype))
    attention_bwd_in<bf16x2>(args, grads);
  else
    attention_bwd_in<float>(args, grads);
}

}  // namespace fastattn::FASTATTN_ISA
