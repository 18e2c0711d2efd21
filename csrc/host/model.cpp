// The machine that csrc/host/model.h describes: blocks, fibers, shared memory and its shadow.
#include "model.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace fastattn::host {

constexpr int kLanes = 32, kMostThreads = 1024, kGuardBytes = 4096;

// lockstep: every thread runs to where it waits, in order. greedy: each warp, in random order, runs
// as far as it can. shuffled: threads in a random order.
enum class Schedule { lockstep, greedy, shuffled };

struct Options {
  Schedule schedule = Schedule::lockstep;
  uint64_t seed = 0;
  int shared_limit = 99 << 10;  // of sm_86, sm_89 and sm_120, the strictest
  bool count_conflicts = false;
};
static Options options;

// ---- what the call may touch ------------------------------------------------------------------

struct Range {
  uintptr_t begin, end;
  bool writable;
};
static thread_local std::vector<Range> permits;

void permit(const void* data, int64_t bytes, bool writable) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (bytes > 0) permits.push_back({begin, begin + static_cast<uintptr_t>(bytes), writable});
}
void forget_permits() { permits.clear(); }

// ---- shared memory's shadow -------------------------------------------------------------------

// Of two bytes of shared memory: who wrote and who read them last, and when. Two threads' accesses
// are in order if a barrier of the block, or a sync_warp of the warp that both are in, lies
// between.
constexpr int kGranule = 2;
constexpr uint16_t kNobody = 0xffff, kSeveral = 0xfffe;
struct Access {
  uint32_t barriers = 0, syncs = 0;  // how many there were before it
  uint16_t thread = kNobody, warp = kNobody, line = 0;
};
struct Granule {
  Access write, read;
  bool written = false, copying = false;
};

// ---- threads ----------------------------------------------------------------------------------

struct Copy {
  unsigned char* to;
  const void* from;
  int bytes;
};
enum class State { ready, at_barrier, at_together, ended };

struct Thread {
  Fiber fiber;
  Position position;
  int index = 0;
  State state = State::ready;
  Site site{"", 0};
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
  std::map<std::pair<const char*, int>, int> visits;  // of a line that accesses shared memory

  int warp() const { return index / kLanes; }
  int lane() const { return index % kLanes; }
};

// One line's accesses of a warp, until all lanes have made it.
struct Together32 {
  uint32_t arrived = 0;
  uintptr_t address[kLanes];
};

struct Warp {
  uint32_t arrived = 0, syncs = 0;
  Together what{};
  Site site{"", 0};
  void* slots[kLanes];
  std::map<std::tuple<const char*, int, int, int>, Together32>
      accesses;  // file, line, visit, bytes
};

struct Conflicts {
  int64_t accesses = 0, extra = 0;  // of warps; passes beyond the fewest
};
static std::map<std::tuple<std::string, std::string, int>, Conflicts>
    conflicts;  // kernel, file, line

struct Block {
  const char* kernel;
  Body body;
  const void* call;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* shared = nullptr;
  int64_t shared_bytes = 0;
  std::vector<Granule> shadow;
  int waiting = 0, live = 0;
  uint32_t barriers = 0;
  std::exception_ptr error;
};

static std::mutex machine;  // one launch at a time
static Block* block = nullptr;
static Thread* current = nullptr;

const Position& position() { return current->position; }
unsigned char* shared_memory() { return block->shared; }
int shared_memory_limit() { return options.shared_limit; }

// ---- errors -----------------------------------------------------------------------------------

static std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}
static std::string text(Site site) {
  const std::string file = site.file;
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line);
}

[[noreturn]] static void fail(const Thread& thread, const std::string& what) {
  throw std::runtime_error(
      "fastattn: kernel " + std::string(block->kernel) + ", block " + text(thread.position.block) +
      ", thread " + text(thread.position.thread) + ", " + text(thread.site) + ": " + what);
}
[[noreturn]] static void fail(Site site, const std::string& what) {
  current->site = site;
  fail(*current, what);
}

// ---- global memory ----------------------------------------------------------------------------

static std::string nearest(uintptr_t at) {
  const Range* best = nullptr;
  uintptr_t least = UINTPTR_MAX;
  for (const Range& range : permits) {
    const uintptr_t off = at < range.begin ? range.begin - at : at - range.end + 1;
    if (off < least) {
      least = off;
      best = &range;
    }
  }
  if (best == nullptr) return "the call has no memory";
  const bool before = at < best->begin;
  const auto offset = static_cast<long long>(before ? best->begin - at : at - best->end);
  return std::to_string(offset) + " bytes " + (before ? "before" : "past") +
         " the nearest memory of the call, of " + std::to_string(best->end - best->begin) +
         " bytes";
}

static void check_global(const void* p, int bytes, bool write, Site site) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  const std::string verb = write ? "writes " : "reads ";
  if (at % static_cast<uintptr_t>(bytes) != 0)
    fail(site, verb + std::to_string(bytes) + " bytes at a misaligned global address");
  bool inside = false;
  for (const Range& range : permits) {
    if (at < range.begin || at + static_cast<uintptr_t>(bytes) > range.end) continue;
    if (!write || range.writable) return;
    inside = true;
  }
  if (inside) fail(site, "writes to an input of the call");
  fail(
      site, verb + std::to_string(bytes) + " bytes of global memory out of bounds: " + nearest(at));
}
void read_global(const void* p, int bytes, Site site) { check_global(p, bytes, false, site); }
void write_global(const void* p, int bytes, Site site) { check_global(p, bytes, true, site); }

// ---- shared memory ----------------------------------------------------------------------------

// The offset of `bytes` bytes at p in shared memory.
static int64_t shared_offset(const void* p, int bytes, const char* verb, Site site) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  const auto base = reinterpret_cast<uintptr_t>(block->shared);
  const auto offset = static_cast<int64_t>(at - base);
  const std::string what = std::string(verb) + " " + std::to_string(bytes) + " bytes ";
  if (at % static_cast<uintptr_t>(bytes) != 0)
    fail(site, what + "at a misaligned shared address, byte " + std::to_string(offset));
  if (offset < 0 || offset + bytes > block->shared_bytes)
    fail(
        site, what + "at byte " + std::to_string(offset) +
                  " of shared memory, of which there are " + std::to_string(block->shared_bytes));
  return offset;
}

static Access now(Site site, bool whole_warp = false) {
  return {
      block->barriers, block->warps[current->warp()].syncs,
      whole_warp ? kSeveral : static_cast<uint16_t>(current->index),
      static_cast<uint16_t>(current->warp()), static_cast<uint16_t>(site.line)};
}
// Is `before` not surely over when `after`, by another thread, happens?
static bool races(const Access& before, const Access& after) {
  if (before.thread == kNobody || before.barriers != after.barriers) return false;
  if (before.warp != after.warp) return true;
  return before.syncs == after.syncs &&
         (before.thread != after.thread || before.thread == kSeveral);
}
static std::string who(const Access& access) {
  const std::string by = access.thread == kSeveral ? std::string("several threads")
                                                   : "thread " + std::to_string(access.thread);
  return by + " at line " + std::to_string(access.line);
}

static void check_read(int64_t offset, int bytes, const Access& mine, Site site) {
  for (int64_t at = offset; at < offset + bytes; at += kGranule) {
    Granule& granule = block->shadow[at / kGranule];
    if (granule.copying)
      fail(site, "reads shared memory that a copy is under way to, byte " + std::to_string(at));
    if (!granule.written)
      fail(site, "reads shared memory that nobody has written, byte " + std::to_string(at));
    if (races(granule.write, mine))
      fail(
          site, "race: reads byte " + std::to_string(at) + " of shared memory that " +
                    who(granule.write) + " wrote, with no barrier between");
    Access& read = granule.read;
    const bool merges = read.thread != kNobody && read.barriers == mine.barriers &&
                        (read.warp != mine.warp || read.syncs == mine.syncs);
    if (!merges) {
      read = mine;
      continue;
    }
    if (read.thread != mine.thread) read.thread = kSeveral;
    if (read.warp != mine.warp) read.warp = kSeveral;
  }
}

static void check_write(int64_t offset, int bytes, const void* value, Site site) {
  const Access mine = now(site);
  const auto* fresh = static_cast<const unsigned char*>(value);
  for (int64_t at = offset; at < offset + bytes; at += kGranule) {
    Granule& granule = block->shadow[at / kGranule];
    if (granule.copying)
      fail(site, "writes shared memory that a copy is under way to, byte " + std::to_string(at));
    if (races(granule.read, mine))
      fail(
          site, "race: writes byte " + std::to_string(at) + " of shared memory that " +
                    who(granule.read) + " read, with no barrier between");
    const bool same = fresh != nullptr && granule.written &&
                      std::memcmp(block->shared + at, fresh + (at - offset), kGranule) == 0;
    if (!same && races(granule.write, mine))
      fail(
          site, "race: writes byte " + std::to_string(at) + " of shared memory that " +
                    who(granule.write) + " wrote too, with no barrier between");
    granule.write = mine;
    granule.written = true;
    granule.copying = fresh == nullptr;
  }
}

// ---- bank conflicts ---------------------------------------------------------------------------

// The passes that a warp's access takes beyond the fewest: 32 banks of 4 bytes serve a phase of
// 128 bytes, and a bank one word at a time. lanes: a bit for each that takes part.
static int extra_passes(const uintptr_t* address, uint32_t lanes, int bytes) {
  const int phase_lanes = bytes <= 4 ? kLanes : 128 / bytes;
  int extra = 0;
  for (int first = 0; first < kLanes; first += phase_lanes) {
    std::vector<uintptr_t> words[32];
    size_t most = 1;
    for (int lane = first; lane < first + phase_lanes; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (uintptr_t at = address[lane] / 4; at <= (address[lane] + bytes - 1) / 4; ++at) {
        auto& bank = words[at % 32];
        if (std::find(bank.begin(), bank.end(), at) == bank.end()) bank.push_back(at);
        most = std::max(most, bank.size());
      }
    }
    extra += static_cast<int>(most) - 1;
  }
  return extra;
}

static void count(Site site, const uintptr_t* address, uint32_t lanes, int bytes) {
  Conflicts& line = conflicts[{block->kernel, text(site), site.line}];
  ++line.accesses;
  line.extra += extra_passes(address, lanes, bytes);
}

// One lane's part of an access that its warp makes at this line.
static void note(const void* p, int bytes, Site site) {
  if (!options.count_conflicts) return;
  const int visit = current->visits[{site.file, site.line}]++;
  auto& accesses = block->warps[current->warp()].accesses;
  Together32& all = accesses[{site.file, site.line, visit, bytes}];
  all.address[current->lane()] = reinterpret_cast<uintptr_t>(p);
  all.arrived |= 1u << current->lane();
  if (all.arrived != 0xffffffffu) return;
  count(site, all.address, all.arrived, bytes);
  accesses.erase({site.file, site.line, visit, bytes});
}

static void count_partial_accesses() {
  for (Warp& warp : block->warps)
    for (const auto& [at, all] : warp.accesses)
      count({std::get<0>(at), std::get<1>(at)}, all.address, all.arrived, std::get<3>(at));
}

void read_shared(const void* p, int bytes, Site site) {
  check_read(shared_offset(p, bytes, "reads", site), bytes, now(site), site);
  note(p, bytes, site);
}
void write_shared(const void* p, const void* value, int bytes, Site site) {
  check_write(shared_offset(p, bytes, "writes", site), bytes, value, site);
  note(p, bytes, site);
}

// ---- copies -----------------------------------------------------------------------------------

void copy_async(void* shared, const void* global, int bytes, Site site) {
  if (bytes < 0 || bytes > 16) fail(site, "copies " + std::to_string(bytes) + " bytes of 16");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail(site, "copies from a misaligned global address");
  for (int at = 0; at < bytes; ++at)
    read_global(static_cast<const unsigned char*>(global) + at, 1, site);
  check_write(shared_offset(shared, 16, "copies", site), 16, nullptr, site);
  note(shared, 16, site);
  current->uncommitted.push_back({static_cast<unsigned char*>(shared), global, bytes});
}

void commit_copies() {
  current->groups.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

static void deliver(const Copy& copy) {
  if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
  Granule* granule = &block->shadow[(copy.to - block->shared) / kGranule];
  for (int i = 0; i < 16 / kGranule; ++i) {
    const uint16_t line = granule[i].write.line;
    granule[i].write = now({"", line});
    granule[i].copying = false;
  }
}

void wait_copies(int pending) {
  auto& groups = current->groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
    for (const Copy& copy : groups.front()) deliver(copy);
}

// ---- waiting ----------------------------------------------------------------------------------

static bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

static void release_barrier() {
  if (block->waiting == 0 || block->waiting < block->live) return;
  for (Thread& thread : block->threads)
    if (thread.state == State::at_barrier) thread.state = State::ready;
  block->waiting = 0;
  ++block->barriers;
}

void barrier(Site site) {
  for (const Thread& thread : block->threads) {
    if (thread.state != State::at_barrier) continue;
    if (!same(thread.site, site))
      fail(
          site, "divergent barrier: thread " + std::to_string(thread.index) + " waits at " +
                    text(thread.site));
    break;
  }
  current->site = site;
  current->state = State::at_barrier;
  ++block->waiting;
  release_barrier();
  current->fiber.leave();
}

static const char* word(Together what) {
  switch (what) {
    case Together::shuffle: return "shuffle";
    case Together::shuffle_xor: return "shuffle_xor";
    case Together::vote: return "any";
    case Together::sync: return "sync_warp";
    case Together::load_matrices: return "load_matrices";
    case Together::load_matrices_transposed: return "load_matrices_transposed";
    case Together::multiply_add_bf16: return "multiply_add (bf16)";
    case Together::multiply_add_fp16: return "multiply_add (fp16)";
    default: return "multiply_add_tf32";
  }
}

void together(Together what, void* slot, void (*all)(void* const* slots, Site site), Site site) {
  Warp& warp = block->warps[current->warp()];
  if (warp.arrived != 0 && (warp.what != what || !same(warp.site, site)))
    fail(
        site, std::string("divergent warp: a lane is at ") + word(what) + ", others at " +
                  word(warp.what) + ", " + text(warp.site));
  warp.what = what;
  warp.site = site;
  warp.slots[current->lane()] = slot;
  warp.arrived |= 1u << current->lane();
  current->site = site;
  if (warp.arrived != 0xffffffffu) {
    current->state = State::at_together;
    current->fiber.leave();
    return;
  }
  all(warp.slots, site);
  warp.arrived = 0;
  if (what == Together::sync) ++warp.syncs;
  for (int lane = 0; lane < kLanes; ++lane)
    block->threads[current->warp() * kLanes + lane].state = State::ready;
}

// ---- matrices ---------------------------------------------------------------------------------

struct MatrixLane {
  uint32_t* r;
  const void* row;
};

template <bool kTransposed>
static void load_all(void* const* slots, Site site) {
  const auto lane = [&](int l) { return static_cast<const MatrixLane*>(slots[l]); };
  const auto entry = [&](int matrix, int row, int col) {
    return static_cast<const uint16_t*>(lane(8 * matrix + row)->row)[col];
  };
  uintptr_t address[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const int64_t offset = shared_offset(lane(l)->row, 16, "load_matrices reads", site);
    check_read(offset, 16, now(site, true), site);
    address[l] = reinterpret_cast<uintptr_t>(lane(l)->row);
  }
  if (options.count_conflicts) count(site, address, 0xffffffffu, 16);
  for (int l = 0; l < kLanes; ++l)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int i = l / 4, c = 2 * (l % 4);
      const uint32_t low = kTransposed ? entry(matrix, c, i) : entry(matrix, i, c);
      const uint32_t high = kTransposed ? entry(matrix, c + 1, i) : entry(matrix, i, c + 1);
      lane(l)->r[matrix] = low | high << 16;
    }
}

void load_matrices(uint32_t* r, const void* row, bool transposed, Site site) {
  MatrixLane mine = {r, row};
  if (transposed)
    together(Together::load_matrices_transposed, &mine, load_all<true>, site);
  else
    together(Together::load_matrices, &mine, load_all<false>, site);
}

struct ProductLane {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// The entry of a register that holds 32 / kBits of them: see device.h for the layout.
static double entry16(uint32_t r, int half, bf16) {
  return to_float(bf16{static_cast<uint16_t>(r >> 16 * half)});
}
static double entry16(uint32_t r, int half, fp16) {
  return to_float(fp16{static_cast<uint16_t>(r >> 16 * half)});
}
static double entry_tf32(uint32_t r) { return bits_to_float(r & 0xffffe000u); }

static float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) && std::isfinite(nearest)
             ? std::nextafter(nearest, 0.f)
             : nearest;
}

// D += A B, D in the lanes' registers.
template <int kDepth>
static void accumulate(
    void* const* slots, const double (&a)[16][kDepth], const double (&b)[kDepth][8]) {
  double sums[16][8];
  const auto each = [&](auto body) {
    for (int l = 0; l < kLanes; ++l)
      for (int i = 0; i < 4; ++i)
        body(
            &static_cast<ProductLane*>(slots[l])->d[i],
            &sums[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2]);
  };
  each([](float* d, double* sum) { *sum = *d; });
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
  each([](float* d, double* sum) { *d = toward_zero(*sum); });
}

template <class T>
static void multiply_all(void* const* slots, Site) {
  double a[16][16], b[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const auto* lane = static_cast<const ProductLane*>(slots[l]);
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; ++r)
      for (int half = 0; half < 2; ++half)
        a[g + 8 * (r % 2)][2 * t + half + 8 * (r / 2)] = entry16(lane->a[r], half, T{});
    for (int r = 0; r < 2; ++r)
      for (int half = 0; half < 2; ++half)
        b[2 * t + half + 8 * r][g] = entry16(lane->b[r], half, T{});
  }
  accumulate(slots, a, b);
}

static void multiply_all_tf32(void* const* slots, Site) {
  double a[16][8], b[8][8];
  for (int l = 0; l < kLanes; ++l) {
    const auto* lane = static_cast<const ProductLane*>(slots[l]);
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][t + 4 * (r / 2)] = entry_tf32(lane->a[r]);
    for (int r = 0; r < 2; ++r) b[t + 4 * r][g] = entry_tf32(lane->b[r]);
  }
  accumulate(slots, a, b);
}

void multiply_add(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Together what, Site site) {
  ProductLane mine = {d, a, {b0, b1}};
  if (what == Together::multiply_add_bf16)
    together(what, &mine, multiply_all<bf16>, site);
  else if (what == Together::multiply_add_fp16)
    together(what, &mine, multiply_all<fp16>, site);
  else
    together(what, &mine, multiply_all_tf32, site);
}

// ---- a block ----------------------------------------------------------------------------------

static void entry() {
  try {
    block->body(block->call);
    if (!current->groups.empty() || !current->uncommitted.empty()) {
      const bool committed = current->uncommitted.empty();
      for (const auto& group : current->groups)
        if (!group.empty()) fail(*current, "ends with copies under way");
      if (!committed) fail(*current, "ends with copies under way");
    }
  } catch (...) {
    block->error = std::current_exception();
  }
  current->state = State::ended;
  current->fiber.leave();
}

// Runs one thread until it waits. An error of the thread comes out here.
static bool step(Thread& thread) {
  if (thread.state != State::ready) return false;
  current = &thread;
  thread.fiber.enter();
  if (block->error) std::rethrow_exception(block->error);
  if (thread.state == State::ended) {
    --block->live;
    release_barrier();
  }
  return true;
}

[[noreturn]] static void report_deadlock() {
  std::map<std::string, int> waits;
  const Thread* first = nullptr;
  for (const Thread& thread : block->threads) {
    if (first == nullptr && thread.state != State::ended) first = &thread;
    const std::string at = " at " + text(thread.site);
    if (thread.state == State::ended) ++waits["ended"];
    if (thread.state == State::at_barrier) ++waits["wait at the barrier" + at];
    if (thread.state == State::at_together)
      ++waits[std::string("wait for their warp in ") + word(block->warps[thread.warp()].what) + at];
  }
  std::string all;
  for (const auto& [what, threads] : waits)
    all += (all.empty() ? "" : ", ") + std::to_string(threads) + " threads " + what;
  fail(*first, "deadlock: " + all);
}

static void run_greedily(Warp& warp) {
  Thread* lanes = &block->threads[(&warp - block->warps.data()) * kLanes];
  for (bool moved = true; moved;) {
    moved = false;
    for (int lane = 0; lane < kLanes; ++lane) moved |= step(lanes[lane]);
  }
}

static void run_threads(std::mt19937_64& random) {
  std::vector<int> order(block->threads.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::vector<int> warps(order.begin(), order.begin() + block->warps.size());
  while (block->live > 0) {
    const auto can_run = [](const Thread& thread) { return thread.state == State::ready; };
    if (std::none_of(block->threads.begin(), block->threads.end(), can_run)) report_deadlock();
    if (options.schedule == Schedule::greedy) {
      std::shuffle(warps.begin(), warps.end(), random);
      for (int warp : warps) run_greedily(block->warps[warp]);
    } else {
      if (options.schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), random);
      for (int thread : order) step(block->threads[thread]);
    }
  }
}

static void start_thread(int index, dim3 at, dim3 threads, dim3 blocks) {
  static std::vector<char*> stacks;
  while (static_cast<int>(stacks.size()) <= index) stacks.push_back(new_stack());
  Thread& thread = block->threads[index];
  const unsigned i = static_cast<unsigned>(index);
  thread.index = index;
  thread.position.thread = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
  thread.position.block = at;
  thread.position.threads = threads;
  thread.position.blocks = blocks;
  thread.fiber.start(stacks[index], entry);
}

static void check_guard() {
  for (int i = 0; i < kGuardBytes; ++i)
    if (block->shared[block->shared_bytes + i] != 0xff)
      fail(block->threads[0], "a thread of the block wrote past its shared memory, unchecked");
}

static void run_block(dim3 at, dim3 threads, dim3 blocks, std::mt19937_64& random) {
  const int count = static_cast<int>(threads.x * threads.y * threads.z);
  block->threads.clear();
  block->threads.resize(count);
  block->warps.assign(count / kLanes, {});
  block->live = count;
  block->waiting = 0;
  block->barriers = 0;
  block->shadow.assign(block->shared_bytes / kGranule + 1, {});
  std::memset(block->shared, 0xff, block->shared_bytes + kGuardBytes);
  for (int index = 0; index < count; ++index) start_thread(index, at, threads, blocks);
  run_threads(random);
  check_guard();
  count_partial_accesses();
}

static void check_limits(const char* kernel, dim3 blocks, dim3 threads, size_t shared_bytes) {
  const std::string shape = std::string("fastattn: kernel ") + kernel + ", grid " + text(blocks) +
                            ", block " + text(threads) + ": ";
  const unsigned count = threads.x * threads.y * threads.z;
  if (count == 0 || count > kMostThreads || count % kLanes != 0 || threads.z > 64)
    throw std::runtime_error(shape + "a block has whole warps and at most 1024 threads");
  if (blocks.x > 0x7fffffffu || blocks.y > 65535 || blocks.z > 65535)
    throw std::runtime_error(shape + "a grid has at most 2147483647 x 65535 x 65535 blocks");
  if (shared_bytes > static_cast<size_t>(options.shared_limit))
    throw std::runtime_error(
        shape + std::to_string(shared_bytes) + " bytes of shared memory, the limit is " +
        std::to_string(options.shared_limit));
}

void run(
    const char* kernel, dim3 blocks, dim3 threads, size_t shared_bytes, Body body,
    const void* call) {
  check_limits(kernel, blocks, threads, shared_bytes);
  const std::lock_guard<std::mutex> lock(machine);
  Block state{};
  state.kernel = kernel;
  state.body = body;
  state.call = call;
  state.shared_bytes = static_cast<int64_t>(shared_bytes);
  state.storage = std::make_unique<unsigned char[]>(shared_bytes + kGuardBytes + 128);
  state.shared = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(state.storage.get()) + 127) / 128 * 128);
  block = &state;
  std::mt19937_64 random(options.seed);
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) run_block({x, y, z}, threads, blocks, random);
}

}  // namespace fastattn::host

// ---- what Python asks (fastattn/emulate/cuda_host.py) -------------------------------------------

extern "C" __attribute__((visibility("default"))) void fastattn_host_options(
    int schedule, uint64_t seed, int shared_limit, int count_conflicts) {
  using namespace fastattn::host;
  const std::lock_guard<std::mutex> lock(machine);
  options = {static_cast<Schedule>(schedule), seed, shared_limit, count_conflicts != 0};
}

// A line "kernel file:line accesses extra" for each line that accessed shared memory while
// conflicts were counted; then forgets them.
extern "C" __attribute__((visibility("default"))) const char* fastattn_host_conflicts() {
  using namespace fastattn::host;
  const std::lock_guard<std::mutex> lock(machine);
  static std::string report;
  report.clear();
  for (const auto& [at, line] : conflicts)
    report += std::get<0>(at) + " " + std::get<1>(at) + " " + std::to_string(line.accesses) + " " +
              std::to_string(line.extra) + "\n";
  conflicts.clear();
  return report.c_str();
}
