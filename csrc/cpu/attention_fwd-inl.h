// Attention forward by the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022),
// transposed as attention_tiles-inl.h says. A task is a block of query rows of one head, over all
// keys it sees; where queries are few and keys many, over kSplitKeys of them, joined afterwards in
// order. Tiles that no row sees are skipped, and only those at the edge of what rows see are
// masked.

namespace fastattn::FASTATTN_ISA {

// A split is long enough to hide its own start, short enough for 2048 keys to feed several threads.
constexpr int64_t kSplitKeys = 512;
// Where no key was seen yet: finite, so that -inf - kLowest is -inf and never NaN.
constexpr float kLowest = -3.4028234663852886e38f;

// The running softmax of a block.
struct Softmax {
  float* out;  // OT (Dv x W), group after group: slot 1 of the scratch
  float row_max[kBlockRows];
  float row_sum[kBlockRows];
};

// A tile of scores becomes weights, and alpha what the sums before it are worth now. largest: of
// the scores and of all before them, where nothing modifies these.
template <int NV, bool kFeatured>
FA_INLINE void weigh_tile(
    const AttentionArgs& args, const Block& block, const Group& group, const Sequence& s,
    int64_t key, int64_t n, float* scores, Vec (&largest)[NV], Vec (&alpha)[NV], Softmax* state) {
  Vec before[NV], sums[NV];
  float* row_max = state->row_max + group.lane;
  float* row_sum = state->row_sum + group.lane;
  FA_FOR (v, NV) before[v] = load(row_max + v * kLanes);
  const bool edge = key < group.all.begin || key + n > group.all.end;
  if (kFeatured) modify_scores(args, block, group, s, key, n, scores, nullptr);
  if (edge) hide_scores(block, group, key, n, scores);
  if (kFeatured || edge) {
    FA_FOR (v, NV) largest[v] = before[v];
    for (int64_t k = 0; k < n; ++k)
      FA_FOR (v, NV) largest[v] = max(largest[v], load(scores + (k * NV + v) * kLanes));
  }
  FA_FOR (v, NV) {
    alpha[v] = exp(before[v] - largest[v]);
    sums[v] = Vec{};
    store(row_max + v * kLanes, largest[v]);
  }
  for (int64_t k = 0; k < n; ++k)
    FA_FOR (v, NV) {
      float* at = scores + (k * NV + v) * kLanes;
      const Vec p = exp(load(at) - largest[v]);
      sums[v] += p;
      store(at, p);
    }
  FA_FOR (v, NV) {
    float* at = row_sum + v * kLanes;
    store(at, fma(load(at), alpha[v], sums[v]));
  }
  if (kFeatured && args.dropout) drop_weights(args, block, group, s, key, n, scores);
}

template <int NV, bool kFeatured, class Word>
static __attribute__((noinline)) void attend(
    const AttentionArgs& args, const Block& block, const Group& group, const Sequence& s,
    const Word* queries, const Tile<Word>& keys, const Tile<Word>& values, int64_t key, int64_t n,
    Softmax* state) {
  float* scores = thread_scratch(2, kTileKeys * NV * kLanes);
  Vec largest[NV], alpha[NV];
  FA_FOR (v, NV) largest[v] = load(state->row_max + group.lane + v * kLanes);
  const int64_t D = words<Word>(args.D);
  const Word* columns = queries + group.lane * D;
  if constexpr (kFeatured)
    dot_rows<NV>(
        keys, n, columns, D, args.scale, scores, largest,
        ScoresAhead{args, block, group, s, key, n});
  else
    dot_rows<NV>(keys, n, columns, D, args.scale, scores, largest);
  weigh_tile<NV, kFeatured>(args, block, group, s, key, n, scores, largest, alpha, state);
  float* out = state->out + group.lane * args.Dv;
  const Word* weights = over_keys(scores, n, NV * kLanes, (Word*)scores);
  add_rows<NV>(values, words<Word>(n), args.Dv, weights, out, alpha);
}

template <bool kFeatured, class Word>
static void attend_any(
    const AttentionArgs& args, const Block& block, const Group& group, const Sequence& s,
    const Word* queries, const Tile<Word>& keys, const Tile<Word>& values, int64_t key, int64_t n,
    Softmax* state) {
  switch (group.vectors) {
    case 3:
      return attend<3, kFeatured>(args, block, group, s, queries, keys, values, key, n, state);
    case 2:
      return attend<2, kFeatured>(args, block, group, s, queries, keys, values, key, n, state);
    default:
      return attend<1, kFeatured>(args, block, group, s, queries, keys, values, key, n, state);
  }
}

// Row pointers of a tensor laid out as the query or out: null where a lane holds no row.
static void block_rows(
    const Block& block, const Group& group, int v, const Heads& x, const Sequence& s, void** rows) {
  for (int l = 0; l < kLanes; ++l) {
    const int r = group.lane + v * kLanes + l;
    const int64_t i = s.query_start + block.query[r];
    rows[l] = r < block.rows ? offset_by(x.data, x.dtype, x.at(s.b, block.head[r], i)) : nullptr;
  }
}

template <class Word>
static void pack_block(
    const Block& block, const Group* groups, int count, const Heads& x, const Sequence& s,
    int64_t cols, Word* out) {
  const int64_t width = words<Word>(cols);
  for (const Group* group = groups; group != groups + count; ++group)
    for (int v = 0; v < group->vectors; ++v) {
      void* rows[kLanes];
      block_rows(block, *group, v, x, s, rows);
      pack(x.dtype, rows, cols, out + group->lane * width + v * kLanes, group->vectors * kLanes);
    }
}

// ---- few rows ---------------------------------------------------------------------------------

// Where weights of a tile lie: row r and key k at data[r * row + k * key].
struct Weights {
  float* data;
  int64_t row, key;
};

// out (R x Dv) = out * alpha + weights (R x n) by values (n x Dv), C vectors wide.
template <int R, int C, class T>
FA_INLINE void few_columns(
    const T* values, int64_t stride, int64_t n, const Weights& weights, const float* alpha,
    float* out, int64_t Dv) {
  Vec sums[R][C] = {};
  const float* weight = weights.data;
  for (int64_t k = 0; k < n; ++k, values += stride, weight += weights.key) {
    Vec p[R];
    FA_FOR (r, R) p[r] = splat(weight[r * weights.row]);
    FA_FOR (c, C) {
      const Vec x = load(values + c * kLanes);
      FA_FOR (r, R) sums[r][c] = fma(p[r], x, sums[r][c]);
    }
  }
  FA_FOR (r, R)
    FA_FOR (c, C) {
      float* at = out + r * Dv + c * kLanes;
      store(at, fma(load(at), splat(alpha[r]), sums[r][c]));
    }
}
// All columns, from c on. C sums run side by side: one alone would wait for itself at every key.
template <int R, int C, class T>
FA_INLINE void few_out(
    Tile<T> values, int64_t n, const Weights& weights, const float* alpha, float* out, int64_t Dv,
    int64_t c = 0) {
  for (; c + C * kLanes <= Dv; c += C * kLanes)
    few_columns<R, C>(values.data + c, values.stride, n, weights, alpha, out + c, Dv);
  if constexpr (C > 1) few_out<R, C / 2>(values, n, weights, alpha, out, Dv, c);
}

// Scores of one row, a multiple of kLanes of them, become weights; returns alpha.
FA_INLINE float weigh_row(int64_t n, float* scores, float* row_max, float* row_sum) {
  Vec largest = splat(*row_max), sum = {};
  for (int64_t k = 0; k < n; k += kLanes) largest = max(largest, load(scores + k));
  const float highest = reduce_max(largest);
  for (int64_t k = 0; k < n; k += kLanes) {
    const Vec p = exp(load(scores + k) - splat(highest));
    sum += p;
    store(scores + k, p);
  }
  const float alpha = exp(splat(*row_max) - splat(highest))[0];
  *row_max = highest;
  *row_sum = *row_sum * alpha + reduce_sum(sum);
  return alpha;
}

// The same by way of lanes full of rows, where everything that a call may ask for is done.
template <bool kFeatured>
static __attribute__((noinline)) Weights weigh_in_lanes(
    const AttentionArgs& args, const Block& block, const Group& group, const Sequence& s,
    int64_t key, int64_t n, const float* scores, float* alpha, Softmax* state) {
  float* turned = thread_scratch(4, kTileKeys * kLanes);
  turn_few(scores, block.rows, n, turned);
  Vec largest[1] = {load(state->row_max)}, factor[1];
  for (int64_t k = 0; k < n; ++k) largest[0] = max(largest[0], load(turned + k * kLanes));
  weigh_tile<1, kFeatured>(args, block, group, s, key, n, turned, largest, factor, state);
  store(alpha, factor[0]);
  return {turned, 1, kLanes};
}

template <class T>
static __attribute__((noinline)) void attend_few(
    const AttentionArgs& args, const Block& block, const Group& group, const Sequence& s,
    const float* queries, Tile<T> keys, Tile<T> values, int64_t key, int64_t n, float* out,
    Softmax* state) {
  Weights weights{thread_scratch(2, kTileKeys * kFewRows), kTileKeys, 1};
  float alpha[kLanes];
  score_few(keys, n, queries, block.rows, args.D, args.scale, weights.data);
  if (is_featured(args))
    weights = weigh_in_lanes<true>(args, block, group, s, key, n, weights.data, alpha, state);
  else if (key < group.all.begin || key + n > group.all.end)
    weights = weigh_in_lanes<false>(args, block, group, s, key, n, weights.data, alpha, state);
  else
    for (int r = 0; r < block.rows; ++r)
      alpha[r] = weigh_row(
          cuts(n, kLanes) * kLanes, weights.data + r * kTileKeys, state->row_max + r,
          state->row_sum + r);
  for_rows(block.rows, [&](auto R, int r) __attribute__((always_inline)) {
    const Weights mine{weights.data + r * weights.row, weights.row, weights.key};
    few_out<R, kLanes / 2 / R>(values, n, mine, alpha + r, out + r * args.Dv, args.Dv);
  });
}

template <class T>
static void attend_few_block(
    const AttentionArgs& args, const Sequence& s, const Block& block, const Group& group,
    Range range, Softmax* state) {
  const int64_t head = block.head[0] / (args.Hq / args.Hkv);
  float* queries = thread_scratch(0, block.rows * (args.D + args.Dv));
  float* out = queries + block.rows * args.D;
  read_block_rows(block, args.query, s, args.D, queries);
  std::memset(out, 0, block.rows * args.Dv * sizeof(float));
  float* buffer = thread_scratch(3, kTileKeys * (args.D + args.Dv));
  for (int64_t key = range.begin; key < range.end; key += kTileKeys) {
    const int64_t n = smaller(kTileKeys, range.end - key);
    if (args.paging.table != nullptr) {
      const Tile<float> keys = read_keys(args, args.key, s, head, key, n, args.D, buffer);
      const Tile<float> values =
          read_keys(args, args.value, s, head, key, n, args.Dv, buffer + kTileKeys * args.D);
      attend_few(args, block, group, s, queries, keys, values, key, n, out, state);
    } else {
      const Tile<T> keys{(const T*)key_row(args, args.key, s, head, key), args.key.row};
      const Tile<T> values{(const T*)key_row(args, args.value, s, head, key), args.value.row};
      attend_few(args, block, group, s, queries, keys, values, key, n, out, state);
    }
  }
  for (int r = 0; r < block.rows; ++r)
    for (int64_t d = 0; d < args.Dv; ++d) state->out[d * kLanes + r] = out[r * args.Dv + d];
}

// ---- blocks -----------------------------------------------------------------------------------

// Takes in keys [range.begin, range.end): slots 0 and 3 of the scratch.
template <class Word>
static void attend_tiles(
    const AttentionArgs& args, const Sequence& s, const Block& block, const Group* groups,
    int count, Range range, Softmax* state) {
  const bool featured = is_featured(args);
  const int64_t head = block.head[0] / (args.Hq / args.Hkv);
  Word* queries = scratch<Word>(0, kBlockRows * args.D);  // QT (words of D x W), group after group
  pack_block(block, groups, count, args.query, s, args.D, queries);
  Word* buffer = scratch<Word>(3, kTileKeys * (args.D + args.Dv));
  for (int64_t key = range.begin; key < range.end; key += kTileKeys) {
    const int64_t n = smaller(kTileKeys, range.end - key);
    const Tile<Word> keys = read_keys(args, args.key, s, head, key, n, args.D, buffer);
    const Tile<Word> values =
        read_over_keys(args, args.value, s, head, key, n, args.Dv, buffer + kTileKeys * args.D);
    for (const Group* group = groups; group != groups + count; ++group) {
      // keys of this tile that some row of the group sees
      const int64_t skip = skipped<Word>(key, group->some.begin);
      const int64_t seen = smaller(n, group->some.end - key) - skip;
      if (seen <= 0) continue;
      const Tile<Word> k{keys.data + skip * keys.stride, keys.stride};
      const Tile<Word> v{values.data + skip / kPerWord<Word> * values.stride, values.stride};
      if (featured)
        attend_any<true>(args, block, *group, s, queries, k, v, key + skip, seen, state);
      else
        attend_any<false>(args, block, *group, s, queries, k, v, key + skip, seen, state);
    }
  }
}

// The softmax of a block over keys [range.begin, range.end).
static void attend_block(
    const AttentionArgs& args, const Sequence& s, const Block& block, const Group* groups,
    int count, Range range, Softmax* state) {
  state->out = thread_scratch(1, kBlockRows * args.Dv);
  std::memset(state->out, 0, block.vectors * kLanes * args.Dv * sizeof(float));
  for (int r = 0; r < block.vectors * kLanes; ++r) {
    state->row_max[r] = kLowest;
    state->row_sum[r] = 0.f;
  }
  if (has_few_rows(args, s))
    FASTATTN_DISPATCH(args.key.dtype, attend_few_block, args, s, block, groups[0], range, state);
  else if (in_pairs(args.query.dtype))
    attend_tiles<bf16x2>(args, s, block, groups, count, range, state);
  else
    attend_tiles<float>(args, s, block, groups, count, range, state);
}

// log of a positive normal number, to 1e-15: 2 artanh((m - 1) / (m + 1)) of m in [sqrt(1/2),
// sqrt(2)). No call, so that a loop over rows is vectorised: std::log took 5 % of 128 keys.
FA_INLINE double log_normal(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const int32_t exponent = (int32_t)(bits - 0x3F3504F3) >> 23;
  bits -= (uint32_t)exponent << 23;
  float m;
  __builtin_memcpy(&m, &bits, sizeof m);
  const double t = (m - 1.0) / (m + 1.0), z = t * t;
  double p = 1 / 17.0;
  FA_FOR (k, 8) p = p * z + 1.0 / (15 - 2 * k);
  return 2 * t * p + exponent * 0.69314718055994530942;
}
FA_INLINE bool is_normal(float x) { return x >= 1.17549435e-38f && x <= 3.4028234e38f; }

// A row's end: what its sums are multiplied by, and its lse, -inf where it saw no key.
struct RowEnd {
  float inverse;
  double lse;
};
static RowEnd end_row(double row_max, double row_sum) {
  const bool seen = row_sum > 0 || row_sum != row_sum;
  return {seen ? (float)(1 / row_sum) : 0.f, seen ? row_max + std::log(row_sum) : -kInf};
}
// With a sink: its share of the sum.
static RowEnd end_row(double row_max, double row_sum, double sink) {
  const bool seen = row_sum > 0 || row_sum != row_sum;
  const double highest = seen && row_max > sink ? row_max : sink;
  if (!seen && !(sink > -kInf)) return {0.f, -kInf};
  const double rescale = seen ? std::exp(row_max - highest) : 0;
  const double sum = row_sum * rescale + std::exp(sink - highest);
  return {(float)(rescale / sum), highest + std::log(sum)};
}

static void end_rows(
    const AttentionArgs& args, const Sequence& s, const Block& block, const Softmax& state,
    float* inverse) {
  const int lanes = block.vectors * kLanes;
  double lse[kBlockRows];
  bool normal = args.sinks.data == nullptr;
  for (int r = 0; r < lanes; ++r) normal &= is_normal(state.row_sum[r]);
  if (normal) {
    for (int r = 0; r < lanes; ++r) {
      inverse[r] = (float)(1 / (double)state.row_sum[r]);
      lse[r] = state.row_max[r] + log_normal(state.row_sum[r]);
    }
  } else {
    for (int r = 0; r < lanes; ++r) {
      const double row_max = state.row_max[r], row_sum = state.row_sum[r];
      const bool sink = args.sinks.data != nullptr && r < block.rows;
      const RowEnd end = sink ? end_row(row_max, row_sum, args.sinks.at(s.b, block.head[r]))
                              : end_row(row_max, row_sum);
      inverse[r] = end.inverse;
      lse[r] = end.lse;
    }
  }
  for (int r = 0; r < block.rows; ++r) {
    const int64_t at =
        s.b * args.lse_batch + block.head[r] * args.lse_head + s.query_start + block.query[r];
    args.lse[at] = (float)lse[r];
    args.lse_low[at] = lse[r] == -kInf ? 0.f : (float)(lse[r] - args.lse[at]);
  }
}

// out = OT / row_sum, and lse.
static void finish_block(
    const AttentionArgs& args, const Sequence& s, const Block& block, const Group* groups,
    int count, Softmax* state) {
  float inverse[kBlockRows];
  end_rows(args, s, block, *state, inverse);
  for (const Group* group = groups; group != groups + count; ++group)
    for (int v = 0; v < group->vectors; ++v) {
      void* rows[kLanes];
      block_rows(block, *group, v, args.out, s, rows);
      unpack(
          args.out.dtype, state->out + group->lane * args.Dv + v * kLanes, group->vectors * kLanes,
          args.Dv, inverse + group->lane + v * kLanes, rows);
    }
}

// ---- tasks -----------------------------------------------------------------------------------

// The blocks of one sequence: for each set of heads that stand together, their rows in blocks, and
// the keys in splits where there is one block of few rows.
struct Plan {
  int64_t together, sets, splits;
  Blocks blocks;

  Plan(const AttentionArgs& args, const Sequence& s)
      : together(heads_together(args, s)), sets(args.Hq / together), blocks(together * s.Sq) {
    splits = s.Sq <= kFewQueries ? larger(1, cuts(s.Sk, kSplitKeys)) : 1;
  }
  int64_t tasks() const { return sets * blocks.count * splits; }
};

struct Forward {
  const AttentionArgs& args;
  int64_t slot;  // floats that a split leaves for the join: its Softmax; 0 where nothing is split
  float* partials;  // a slot for every task

  void run(const Sequence& s, int64_t place, int64_t task) const {
    const Plan plan(args, s);
    const int64_t split = place % plan.splits;
    // the last blocks of a causal sequence see the most keys: they go first
    const int64_t index = plan.blocks.count - 1 - place / plan.splits % plan.blocks.count;
    const int64_t set = place / plan.splits / plan.blocks.count;
    Block block;
    Group groups[kBlockVectors];
    Softmax state;
    set_block(args, s, set * plan.together, plan.blocks, index, &block);
    const int count = split_groups(block, groups);
    Range range = block.keys;
    if (plan.splits > 1) {
      range.begin = larger(range.begin, split * kSplitKeys);
      range.end = smaller(range.end, (split + 1) * kSplitKeys);
    }
    attend_block(args, s, block, groups, count, range, &state);
    if (plan.splits == 1) return finish_block(args, s, block, groups, count, &state);
    const int64_t lanes = block.vectors * kLanes;
    float* partial = partials + task * slot;
    std::memcpy(partial, state.row_max, lanes * sizeof(float));
    std::memcpy(partial + lanes, state.row_sum, lanes * sizeof(float));
    std::memcpy(partial + 2 * lanes, state.out, lanes * args.Dv * sizeof(float));
  }

  // The splits of one block, in order; `task` is its first.
  void join(const Sequence& s, int64_t place, int64_t task) const {
    const Plan plan(args, s);
    if (plan.splits == 1 || place % plan.splits != 0) return;
    Block block;
    Group groups[kBlockVectors];
    Softmax state;
    const int64_t index = plan.blocks.count - 1 - place / plan.splits % plan.blocks.count;
    const int64_t set = place / plan.splits / plan.blocks.count;
    set_block(args, s, set * plan.together, plan.blocks, index, &block);
    const int count = split_groups(block, groups);
    state.out = thread_scratch(1, kBlockRows * args.Dv);
    std::memset(state.out, 0, block.vectors * kLanes * args.Dv * sizeof(float));
    for (int r = 0; r < kBlockRows; ++r) {
      state.row_max[r] = kLowest;
      state.row_sum[r] = 0.f;
    }
    for (int64_t split = 0; split < plan.splits; ++split)
      join_split(block, groups, count, partials + (task + split) * slot, &state);
    finish_block(args, s, block, groups, count, &state);
  }

  void join_split(
      const Block& block, const Group* groups, int count, const float* partial,
      Softmax* state) const {
    const int64_t lanes = block.vectors * kLanes;
    for (const Group* group = groups; group != groups + count; ++group)
      for (int v = 0; v < group->vectors; ++v) {
        const int lane = group->lane + v * kLanes;
        const Vec mine = load(state->row_max + lane), theirs = load(partial + lane);
        const Vec highest = max(mine, theirs);
        const Vec a = exp(mine - highest), b = exp(theirs - highest);
        const Vec sum = load(state->row_sum + lane) * a + load(partial + lanes + lane) * b;
        store(state->row_max + lane, highest);
        store(state->row_sum + lane, sum);
        for (int64_t d = 0; d < args.Dv; ++d) {
          const int64_t at = group->lane * args.Dv + (d * group->vectors + v) * kLanes;
          const Vec theirs_out = load(partial + 2 * lanes + at);
          store(state->out + at, load(state->out + at) * a + theirs_out * b);
        }
      }
  }
};

static void attention_fwd(const AttentionArgs& args) {
  Forward forward{args, 0, nullptr};
  const Pieces tasks(args, (int64_t*)thread_scratch(9, 2 * args.B), [&](const Sequence& s) {
    const Plan plan(args, s);
    if (plan.splits > 1) forward.slot = larger(forward.slot, plan.blocks.rows_each * (args.Dv + 2));
    return plan.tasks();
  });
  forward.partials = thread_scratch(10, tasks.total() * forward.slot);
  parallel_tasks(tasks.total(), [&](int64_t task) {
    const int64_t b = tasks.sequence_of(task);
    forward.run(sequence(args, b), task - tasks.begin(b), task);
  });
  if (forward.slot == 0) return;
  parallel_tasks(tasks.total(), [&](int64_t task) {
    const int64_t b = tasks.sequence_of(task);
    forward.join(sequence(args, b), task - tasks.begin(b), task);
  });
}

}  // namespace fastattn::FASTATTN_ISA
